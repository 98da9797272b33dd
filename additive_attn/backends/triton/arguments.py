"""Converts the arguments of the operators to those of kernels: views over (outer, inner) batch
dims, prepared tensors, masks. An argument that is not given is None, for which kernels are
compiled apart."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from additive_attn.backends.triton.batch import BatchShape, batch_strides
from additive_attn.backends.triton.launch import bits, processors, target
from additive_attn.backends.triton.plan import Piece, key_range, workspace_pieces
from additive_attn.backends.triton.prepare import prepare
from additive_attn.backends.triton.prepared import Prepared
from additive_attn.backends.triton.tiles import DIFFERENCE_MAX_FEATURES
from additive_attn.spec.call import Call, lse_dtype
from additive_attn.spec.dropout import keep_threshold
from additive_attn.spec.masks import block_mask, check_masking


class BlockTiles(NamedTuple):
    """The tiles that the numbers of a block table refer to."""

    pairs: Tensor  # (number, rows, keys), uint8
    number: int
    rows: int
    keys: int


class Problem:
    """One call, perhaps with a location term. Its methods return arguments in the order of the
    parameters of kernels. ``exponential`` and ``quads`` say which layouts of exponentials kernels
    will read (``prepare.py``)."""

    def __init__(
        self, call: Call, location: Tensor | None = None, location_weight: Tensor | None = None,
        *, exponential: bool = False, quads: bool = False,
    ) -> None:  # fmt: skip
        query, key, value, weight = call.inputs
        _check_sizes(call, location, location_weight)
        if any(x is not None for x in call[4:9]):
            check_masking(call.masking, call.batch(), query.shape[-2], key.shape[-2], query.device)
        given, call = call.attn_mask, _with_dense_table(call)
        attn_mask, lengths = call.attn_mask, call.lengths
        left, right = call.left, call.right
        seed, dropout_p, scale = call.options
        shape = query.shape[:-2]
        if (
            key.shape[:-2] != shape
            or value.shape[:-2] != shape
            or weight.dim() > 1
            or not (attn_mask is lengths is seed is call.starts is call.block_table is None)
        ):
            shape = call.batch()
        if location is not None and location_weight is not None:
            batches = location.shape[:-2], location_weight.shape[:-2]
            shape = torch.broadcast_shapes(shape, *batches)
        self.batch = BatchShape(shape)
        self.device = query.device
        self.dtype = query.dtype
        self.wide = query.dtype == torch.float64
        self.accumulator = lse_dtype(query.dtype)
        self.rows, self.hidden = query.shape[-2:]
        self.keys, self.values = value.shape[-2:]
        self.entries = self.batch.entries
        self._arguments = query, key, weight
        self._layouts = exponential, quads
        self.query, self.query_strides = self.batch.strided(query, 2)
        self.key, self.key_strides = self.batch.strided(key, 2)
        self.value, self.value_strides = self.batch.strided(value, 2)
        self.weight, self.weight_strides = self.batch.strided(weight, 1)
        self.mask = None if attn_mask is None else _mask_view(attn_mask, self)
        self.block_tiles = None
        if call.block_table is not None and call.block_tiles is not None:
            self.mask = self.batch.view(call.block_table, 2)
            pairs = call.block_tiles.contiguous().view(torch.uint8)
            self.block_tiles = BlockTiles(pairs, *pairs.shape)
        # A mask of booleans has no gradient.
        self.float_mask = None
        if given is not None and given.is_floating_point():
            self.float_mask = given
        if call.starts is not None:
            lengths = _packed(call.starts, lengths, self.keys)
        self.lengths = None if lengths is None else _lengths_view(lengths, self)
        self.seed = None if seed is None else self.batch.view(seed, 0)
        self.left = self.rows if left < 0 else min(left, self.rows)
        self.right = self.keys if right < 0 else min(right, self.keys)
        self.dropout_p = dropout_p
        self.scale = scale
        self.location = location
        self.location_weight = location_weight
        self.filters = 0 if location is None else location.shape[-2]

    def check_outputs(self, **given: Tensor | None) -> None:
        """Raises unless gradients, and outputs that are passed back, have the shapes that follow
        from the inputs: kernels read them by the inputs' shapes."""
        tails = {"out": (self.values,), "weights": (self.keys,), "scores": (self.keys,), "lse": ()}
        for name, x in given.items():
            expected = (*self.batch.shape, self.rows, *tails[name.removeprefix("grad_")])
            if x is not None and tuple(x.shape) != expected:
                raise RuntimeError(f"{name} has shape {tuple(x.shape)}; it must be {expected}.")

    @property
    def scale_bits(self) -> int:
        return bits(self.scale)

    @property
    def padded(self) -> int:
        """The number of features of the prepared tensors."""
        return self.prepared.weight.weight.shape[-1]

    @cached_property
    def processors(self) -> int:
        return processors(self.device)

    @cached_property
    def prepared(self) -> Prepared:
        exponential, quads = self._layouts
        return prepare(
            *self._arguments, self.batch, self.scale, exponential=exponential, quads=quads
        )

    def inputs(self) -> tuple[object, ...]:
        """Returns the parameters ``query`` to ``key_h``."""
        return (self.query, self.key, *self.query_strides, *self.key_strides)

    def prepared_rows_arguments(self) -> tuple[object, ...]:
        """Returns the parameters ``query_rows`` to ``key_exp_inner``; float64 takes the direct
        form, which needs none."""
        if self.wide:
            return (None, None, 0, 0, 0, 0)
        _, query, key = self.prepared
        assert query is not None and key is not None
        # All tensors are contiguous within an entry: strides in rows serve all of them.
        of_query = batch_strides(query.size, query.size.shape[2])
        return (query, key, *of_query, *batch_strides(key.size, key.size.shape[2]))

    def prepared_arguments(self) -> tuple[object, ...]:
        """Returns the parameters ``query_rows`` to ``weight_inner``."""
        weight = self.prepared.weight
        return (*self.prepared_rows_arguments(), weight, *batch_strides(weight.score_scale))

    def mask_arguments(self) -> tuple[object, ...]:
        """Returns the parameters ``mask`` to ``mask_column`` and ``tiles``."""
        if self.mask is None:
            return (None, 0, 0, 0, 0, None)
        mask = self.mask.view(torch.uint8) if self.mask.dtype == torch.bool else self.mask
        return (mask, *mask.stride(), self.block_tiles)

    def length_arguments(self) -> tuple[object, ...]:
        """Returns the parameters ``lengths`` to ``length_row``."""
        return (None, 0, 0, 0) if self.lengths is None else (self.lengths, *self.lengths.stride())

    def dropout_arguments(self) -> tuple[object, ...]:
        """Returns the parameters ``seed`` to ``keep_bits``."""
        if self.seed is None:
            return (None, 0, 0, 0, 0)
        keep_scale = 0.0 if self.dropout_p == 1 else 1 / (1 - self.dropout_p)
        return (self.seed, *self.seed.stride(), keep_threshold(self.dropout_p), bits(keep_scale))

    def location_arguments(self) -> tuple[object, ...]:
        """Returns the parameters ``location`` to ``filters``."""
        both = self.batched(self.location, 2), self.batched(self.location_weight, 2)
        return (*both[0], *both[1], self.filters)

    def batched(self, x: Tensor | None, rank: int) -> tuple[Any, ...]:
        """Returns a tensor, and its strides over the batch and over its last ``rank`` dims."""
        if x is None:
            return (None, *(0,) * (rank + 2))
        x, strides = self.batch.strided(x, rank)
        return (x, *strides)

    def form(self) -> dict[str, object]:
        return {
            "DIFFERENCE": self.hidden <= DIFFERENCE_MAX_FEATURES,
            "TARGET": target(),
        }

    def key_range(self, piece: Piece) -> tuple[int, int]:
        rows = piece.row, piece.row + piece.rows
        return key_range(*rows, self.keys, self.left, self.right)

    def pieces(self, row_block: int = 1, features: int = 0) -> list[Piece]:
        return workspace_pieces(
            self.entries, self.rows, self.keys, self.left, self.right, self.wide, row_block,
            features,
        )  # fmt: skip


def _check_sizes(call: Call, location: Tensor | None, location_weight: Tensor | None) -> None:
    """Raises unless the sizes of the inputs agree: kernels read by those of queries and values,
    and the operators are public."""
    query, key, value, weight = call.inputs
    hidden, keys = query.shape[-1], value.shape[-2]
    if not key.shape[-1] == weight.shape[-1] == hidden:
        raise RuntimeError(
            f"The last dims of query, key and weight must agree; they are {hidden}, "
            f"{key.shape[-1]} and {weight.shape[-1]}."
        )
    if key.shape[-2] != keys:
        raise RuntimeError(f"value has {keys} rows for {key.shape[-2]} keys.")
    if call.seed is None and call.dropout_p:
        raise RuntimeError(f"dropout_p is {call.dropout_p} but there is no seed.")
    if location is None or location_weight is None:
        if location is not location_weight:
            raise RuntimeError("location and location_weight go together; one is missing.")
    elif location.shape[-1] != keys or location_weight.shape[-2:] != (location.shape[-2], hidden):
        raise RuntimeError(
            f"location has shape {tuple(location.shape)} and location_weight "
            f"{tuple(location_weight.shape)}; they must be (..., F, {keys}) and (..., F, "
            f"{hidden})."
        )


def _with_dense_table(call: Call) -> Call:
    """Replaces a block table beside a mask, or of a single row, by a dense mask."""
    mask, table, block_tiles = call.attn_mask, call.block_table, call.block_tiles
    if table is None or block_tiles is None or (mask is None and call.query.shape[-2] > 1):
        return call
    allowed = block_mask(table, block_tiles, (0, call.query.shape[-2]), (0, call.key.shape[-2]))
    if mask is not None:
        allowed = (
            mask & allowed if mask.dtype == torch.bool else torch.where(allowed, mask, -torch.inf)
        )
    return call._replace(attn_mask=allowed, block_table=None, block_tiles=None)


def _packed(starts: Tensor, lengths: Tensor | None, keys: int) -> Tensor:
    """Returns starts and lengths in one tensor (``masks.interval``)."""
    ends = keys if lengths is None else lengths.clamp(0, keys)
    return ((starts.clamp(0, keys) << 32) | ends).view(torch.uint64)


def _mask_view(mask: Tensor, problem: Problem) -> Tensor:
    # Narrowed before its rows and keys are expanded: expanded ones might be copied.
    mask, batch = problem.batch.narrow(torch.atleast_2d(mask), 2), problem.batch
    return mask.expand(batch.outer, batch.inner, problem.rows, problem.keys)


def _lengths_view(lengths: Tensor, problem: Problem) -> Tensor:
    lengths, batch = problem.batch.narrow(torch.atleast_1d(lengths), 1), problem.batch
    return lengths.expand(batch.outer, batch.inner, problem.rows)
