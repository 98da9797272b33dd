from additive_attn.config import show_config

show_config()
