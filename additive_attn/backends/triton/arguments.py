"""The arguments of the operators as the kernels take them: views over (outer, inner) batch dims,
prepared tensors, masks."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.batch import BatchShape
from additive_attn.backends.triton.launch import bits, launch, processors, target
from additive_attn.backends.triton.prepare import (
    CENTRED_FEATURES,
    FEW_FEATURES,
    PreparedRows,
    PreparedWeight,
    prepare_rows,
    prepare_weight,
)
from additive_attn.backends.triton.scores import score_kernel
from additive_attn.spec.call import Call, lse_dtype
from additive_attn.spec.dropout import keep_threshold


class Problem:
    """One call. What a kernel needs comes in the order of its parameters."""

    def __init__(self, call: Call) -> None:
        query, key, value, weight = call.inputs
        attn_mask, lengths, left, right = call.masking
        seed, dropout_p, scale = call.options
        shape = query.shape[:-2]
        if (
            key.shape[:-2] != shape
            or value.shape[:-2] != shape
            or weight.dim() > 1
            or not (attn_mask is lengths is seed is None)
        ):
            shape = call.batch()
        self.batch = BatchShape(shape)
        self.device = query.device
        self.dtype = query.dtype
        self.wide = query.dtype == torch.float64
        self.accumulator = lse_dtype(query.dtype)
        self.rows, self.hidden = query.shape[-2:]
        self.keys, self.values = value.shape[-2:]
        self.entries = self.batch.entries
        self._arguments = query, key, weight
        self.query, self.query_strides = self.batch.strided(query, 2)
        self.key, self.key_strides = self.batch.strided(key, 2)
        self.value, self.value_strides = self.batch.strided(value, 2)
        self.raw_weight, self.weight_strides = self.batch.strided(weight, 1)
        self.mask = None if attn_mask is None else _mask_view(attn_mask, self)
        self.lengths = None if lengths is None else _lengths_view(lengths, self)
        self.seed = None if seed is None else self.batch.view(seed, 0)
        self.left = self.rows if left < 0 else min(left, self.rows)
        self.right = self.keys if right < 0 else min(right, self.keys)
        self.dropout_p = dropout_p
        self.scale = scale

    @property
    def scale_bits(self) -> int:
        return bits(self.scale)

    @cached_property
    def processors(self) -> int:
        return processors(self.device)

    @cached_property
    def weight(self) -> PreparedWeight:
        return prepare_weight(self._arguments[2], self.batch, self.scale)

    @cached_property
    def prepared(self) -> tuple[PreparedRows, PreparedRows]:
        """Exponentials of query and key."""
        query, key, _ = self._arguments
        return (
            prepare_rows(query, -1, self.weight, self.batch),
            prepare_rows(key, 1, self.weight, self.batch),
        )

    def score_arguments(self) -> tuple[object, ...]:
        """Parameters ``query`` to ``mask_column`` of the kernels that compute scores."""
        prepared: tuple[object, ...]
        if self.wide:
            # Never read: float64 takes the direct form.
            prepared = (*(self.weight.weight,) * 6, 0, 0, 0, 0)
        else:
            rows, keys = self.prepared
            prepared = (
                rows.exponential, keys.exponential, rows.size, keys.size,
                rows.correction, keys.correction,
                *rows.size.stride()[:2], *keys.size.stride()[:2],
            )  # fmt: skip
        return (
            self.query, self.key, *self.query_strides, *self.key_strides, *prepared,
            self.weight.weight, self.weight.unit, self.weight.centre, *self.weight.unit.stride(),
            *self.mask_arguments(),
        )  # fmt: skip

    def mask_arguments(self) -> tuple[object, ...]:
        """Parameters ``mask`` to ``mask_column``."""
        if self.mask is None:
            return (self.query, 0, 0, 0, 0)
        mask = self.mask.view(torch.uint8) if self.mask.dtype == torch.bool else self.mask
        return (mask, *mask.stride())

    def length_arguments(self) -> tuple[object, ...]:
        """Parameters ``lengths`` to ``length_row``."""
        if self.lengths is None:
            return (self.query, 0, 0, 0)
        return (self.lengths, *self.lengths.stride())

    def dropout_arguments(self) -> tuple[object, ...]:
        """Parameters ``seed`` to ``keep_bits``."""
        if self.seed is None:
            return (self.query, 0, 0, 0, 0)
        keep_scale = 0.0 if self.dropout_p == 1 else 1 / (1 - self.dropout_p)
        return (self.seed, *self.seed.stride(), keep_threshold(self.dropout_p), bits(keep_scale))

    def masking(self) -> dict[str, object]:
        kind = "none"
        if self.mask is not None:
            kind = "bool" if self.mask.dtype == torch.bool else "float"
        return {"MASK": kind, "HAS_LENGTHS": self.lengths is not None}

    def form(self) -> dict[str, object]:
        return {
            "FEW": self.hidden <= FEW_FEATURES,
            "CENTRED": CENTRED_FEATURES,
            "TARGET": target(),
        }

    def key_range(self, row_begin: int, row_end: int) -> tuple[int, int]:
        """Keys that rows [row_begin, row_end) may attend to, lengths and mask aside."""
        # A multiple of four, in which the dropout factors come, and of what is loaded at once.
        low = min(max(0, row_begin - self.left), self.keys) // 16 * 16
        return low, max(low, min(self.keys, row_end + self.right))

    def chunks(self, row_block: int = 1) -> list[tuple[int, int, int, int]]:
        """(first entry, entries, first row, rows) whose scores, padded to whole blocks, fit into
        the workspace; of one row there is always room."""
        budget = tiles.WORKSPACE_ELEMENTS
        key_block = tiles.score_tile(self.rows, self.wide).keys

        def size(rows: int) -> int:
            keys = max(1, min(self.keys, rows + self.left + self.right))
            return -(-rows // row_block) * row_block * (-(-keys // key_block) * key_block)

        some_rows = self.rows
        while some_rows > 1 and size(some_rows) > budget:
            some_rows = -(-some_rows // 2)
        if some_rows < self.rows and some_rows > 64:
            some_rows = some_rows // 64 * 64
        some_entries = 1
        if some_rows == self.rows:
            some_entries = max(1, min(self.entries, budget // size(self.rows)))
        return [
            (n, min(some_entries, self.entries - n), i, min(some_rows, self.rows - i))
            for n in range(0, self.entries, some_entries)
            for i in range(0, self.rows, some_rows)
        ]

    def scores(self, entry: int, entries: int, row: int, rows: int, key: int, keys: int) -> Tensor:
        """(entries, rows, keys and padding): scale * score + mask, -inf where a row may not
        attend."""
        tile = tiles.score_tile(rows, self.wide)
        padded = -(-keys // tile.keys) * tile.keys
        scores = torch.empty(entries, rows, padded, dtype=self.accumulator, device=self.device)
        programs = entries * -(-rows // tile.rows) * (padded // tile.keys)
        launch(
            score_kernel, programs, scores,
            *self.score_arguments(), *self.length_arguments(),
            scores, self.batch.inner, entry, self.rows, row, rows, self.keys, key, padded,
            self.hidden, self.weight.padded, self.left, self.right,
            **tile.sizes(), **self.form(), **self.masking(), WIDE=self.wide,
            num_warps=tile.warps,
        )  # fmt: skip
        return scores


def _mask_view(mask: Tensor, problem: Problem) -> Tensor:
    # Narrowed with the rows and keys that it has: expanded ones might be copied.
    mask, batch = problem.batch.narrow(torch.atleast_2d(mask), 2), problem.batch
    return mask.expand(batch.outer, batch.inner, problem.rows, problem.keys)


def _lengths_view(lengths: Tensor, problem: Problem) -> Tensor:
    lengths, batch = problem.batch.narrow(torch.atleast_1d(lengths), 1), problem.batch
    return lengths.expand(batch.outer, batch.inner, problem.rows)
