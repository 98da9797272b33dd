"""Additive (Bahdanau) attention for PyTorch as a fused layer."""

from additive_attn.config import show_config
from additive_attn.functional import additive_attention, additive_attention_step, additive_scores
from additive_attn.merge import merge_attention
from additive_attn.nn.additive import AdditiveAttention
from additive_attn.nn.coverage import CoverageAttention, coverage_loss
from additive_attn.nn.decoding import ProjectedMemory
from additive_attn.nn.history import AttentionState
from additive_attn.nn.location import LocationSensitiveAttention
from additive_attn.nn.multihead import MultiheadAdditiveAttention
from additive_attn.nn.plain import PlainAdditiveAttention
from additive_attn.plot import plot_attention
from additive_attn.varlen import varlen_additive_attention

__version__ = "0.1.0"

__all__ = [
    "AdditiveAttention",
    "AttentionState",
    "CoverageAttention",
    "LocationSensitiveAttention",
    "MultiheadAdditiveAttention",
    "PlainAdditiveAttention",
    "ProjectedMemory",
    "__version__",
    "additive_attention",
    "additive_attention_step",
    "additive_scores",
    "coverage_loss",
    "merge_attention",
    "plot_attention",
    "show_config",
    "varlen_additive_attention",
]
