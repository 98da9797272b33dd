import argparse

from additive_attn.config import show_config

argparse.ArgumentParser(
    prog="python -m additive_attn", description="Says which implementation runs, and why."
).parse_args()
show_config()
