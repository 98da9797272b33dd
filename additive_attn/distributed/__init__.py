"""Attention over a sequence that is sharded over the processes of a DeviceMesh."""

from additive_attn.distributed.attention import context_parallel_additive_attention
from additive_attn.distributed.sequence import shard_sequence, unshard_sequence

__all__ = ["context_parallel_additive_attention", "shard_sequence", "unshard_sequence"]
