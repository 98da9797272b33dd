"""Attention over the processes of a DeviceMesh: a sequence, or heads, sharded."""

from additive_attn.distributed.attention import context_parallel_additive_attention
from additive_attn.distributed.heads import HeadParallel
from additive_attn.distributed.sequence import shard_sequence, unshard_sequence

__all__ = [
    "HeadParallel",
    "context_parallel_additive_attention",
    "shard_sequence",
    "unshard_sequence",
]
