"""A classifier of long documents: a token attends to a window of tokens and to some global
tokens, and those attend to all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from additive_attn import additive_attention, merge_attention


class WindowAndGlobal(nn.Module):
    """Additive attention of tokens and global tokens, in time and memory linear in the length."""

    def __init__(self, size: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.project = nn.Linear(size, 3 * size)  # queries, keys, values
        self.energy = nn.Parameter(torch.randn(heads, size // heads) / (size // heads) ** 0.5)
        self.out = nn.Linear(size, size)

    def split(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values (B, heads, L, size / heads)."""
        return [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.project(x).chunk(3, dim=-1)
        ]

    def forward(self, tokens: Tensor, globals_: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(tokens)
        global_q, global_k, global_v = self.split(globals_)
        # Two disjoint sets of keys, one softmax over both.
        near = additive_attention(
            q, k, v, self.energy, window=(self.window, self.window), lengths=lengths, need_lse=True
        )
        far = additive_attention(q, global_k, global_v, self.energy, need_lse=True)
        of_tokens, _ = merge_attention(*zip(near, far, strict=True))
        of_globals = additive_attention(
            global_q, torch.cat([global_k, k], -2), torch.cat([global_v, v], -2), self.energy,
            lengths=lengths + globals_.shape[1],
        )  # fmt: skip
        return self.joined(of_tokens), self.joined(of_globals)

    def joined(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    def __init__(self, size: int, heads: int, window: int) -> None:
        super().__init__()
        self.attention = WindowAndGlobal(size, heads, window)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, tokens: Tensor, globals_: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        norm, mlp_norm = self.norms
        attended = self.attention(norm(tokens), norm(globals_), lengths)
        tokens, globals_ = tokens + attended[0], globals_ + attended[1]
        return tuple(x + self.mlp(mlp_norm(x)) for x in (tokens, globals_))


class Classifier(nn.Module):
    """Predicts the class from the global tokens."""

    def __init__(
        self, vocabulary: int, classes: int, size: int = 64, heads: int = 2, layers: int = 2,
        window: int = 64, global_tokens: int = 4, dropout: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocabulary, size, padding_idx=0)
        self.global_tokens = nn.Parameter(torch.randn(global_tokens, size) * 0.1)
        self.layers = nn.ModuleList(Layer(size, heads, window) for _ in range(layers))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(global_tokens * size, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(tokens)
        globals_ = self.global_tokens.expand(len(tokens), -1, -1)
        for layer in self.layers:
            x, globals_ = layer(x, globals_, lengths)
        return self.head(self.dropout(self.norm(globals_).flatten(1)))
