"""The operators in plain PyTorch, on any device, a block of rows at a time, so that memory stays
bounded.

Forward is the formula of each block, backward its derivative (math.md, eq. 9 to 12), for which a
block computes its energies again. Keys that no row of a block may attend to are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from additive_attn.backends.plain.whole import (
    formula,
    is_finite,
    product,
    shielded,
    weight_gradient,
)
from additive_attn.spec.call import (
    Call,
    Inputs,
    Masking,
    Options,
    Upstream,
    backward_arguments,
    lse_dtype,
)
from additive_attn.spec.dropout import keep_mask
from additive_attn.spec.formula import (
    add_bias,
    attended_pairs,
    energies,
    keep_factors,
    scores,
    softmax,
    weighted_sum,
    widened,
)
from additive_attn.spec.masks import allowed_pairs, mask_block

# Elements of a block's energies for each thread; one row of one entry is the least that a block
# can hold. More threads share larger blocks, since torch gives none of them a small part.
_BLOCK_ELEMENTS = 2**19
_MOST_THREADS = 32


def unnarrowed(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which compiled graphs and backward may run operators under."""

    def run(*arguments: Any) -> Any:
        with torch._C._DisableAutocast():
            return operator(*arguments)

    return run


@unnarrowed
def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, need_weights = Call(*arguments[:14]), arguments[14]
    query, key, value, _ = call.inputs
    batch, num_queries, num_keys = call.batch(), query.shape[-2], key.shape[-2]
    out = query.new_zeros(*batch, num_queries, value.shape[-1])
    weights = query.new_zeros((*batch, num_queries, num_keys) if need_weights else (0,))
    lse = query.new_full((*batch, num_queries), -torch.inf, dtype=lse_dtype(query.dtype))
    for block in blocks_of(call, batch):
        out_block, weights_block, lse_block = formula(
            block.inputs(call.inputs),
            *block.masks(call.masking, query.device),
            block.factors(call.options, batch, lse.dtype),
            call.options.scale,
            need_lse=True,
        )
        block.of_rows(out).copy_(out_block)
        block.of_rows(lse[..., None]).squeeze(-1).copy_(lse_block)
        if need_weights:
            block.of_pairs(weights).copy_(weights_block)
    return out, weights, lse


class Gradients(NamedTuple):
    """Over the whole batch, in the dtype that is computed in; None where not needed."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    weight: Tensor | None
    mask: Tensor | None


@unnarrowed
def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    upstream, call, lse, needs = backward_arguments(arguments)
    (query, key, value, weight), attn_mask = call.inputs, call.masking.attn_mask
    if attn_mask is not None and not attn_mask.is_floating_point():
        attn_mask = None  # has no gradient
    batch, dtype = lse.shape[:-1], lse.dtype

    def zeros(need: bool, *shape: int) -> Tensor | None:
        return query.new_zeros(shape, dtype=dtype) if need else None

    gradients = Gradients(
        query=zeros(needs.query, *batch, *query.shape[-2:]),
        key=zeros(needs.key, *batch, *key.shape[-2:]),
        value=zeros(needs.value, *batch, *value.shape[-2:]),
        weight=zeros(needs.weight, *batch, weight.shape[-1]),
        mask=None if attn_mask is None else zeros(needs.mask, *attn_mask.shape),
    )
    for block in blocks_of(call, batch):
        _backward_block(block, call, batch, upstream, gradients)
    dtypes = [query.dtype] * 3 + [dtype, query.dtype if attn_mask is None else attn_mask.dtype]
    grad_query, grad_key, grad_value, grad_weight, grad_mask = (
        query.new_empty(0, dtype=target) if gradient is None else gradient.to(target)
        for gradient, target in zip(gradients, dtypes, strict=True)
    )
    return grad_query, grad_key, grad_value, grad_weight, grad_mask


def _backward_block(
    block: Block, call: Call, batch: torch.Size, upstream: Upstream, gradients: Gradients
) -> None:
    """Adds what the pairs of a block contribute to the gradients."""
    query, key, value, weight = (widened(tensor) for tensor in block.inputs(call.inputs))
    attn_mask, attended = block.masks(call.masking, query.device)
    factors = block.factors(call.options, batch, query.dtype)
    query, scale = query.expand(*block.of_batch(batch), *query.shape[-2:]), call.options.scale

    energy = energies(query, key)
    score = scores(energy, weight)
    shield = None if attended is None or is_finite(score.sum()) else attended
    if shield is not None:
        energy = energies(query, key, shield)
        score = scores(energy, weight)
    weights = softmax(add_bias(score * scale, attn_mask), attended)

    grad_out = None if upstream.out is None else widened(block.of_rows(upstream.out))
    if gradients.value is not None and grad_out is not None:
        kept = weights if factors is None else weights * factors
        _add_value_gradient(block.of_keys(gradients.value), kept, grad_out, attended)
    if all(gradient is None for gradient in gradients[:2] + gradients[3:]):
        return
    grad_score = score_gradient(
        weights, None if grad_out is None else (grad_out, value), factors, attended,
        None if upstream.weights is None else block.of_pairs(upstream.weights),
        None if upstream.lse is None else block.of_rows(upstream.lse.unsqueeze(-1)),
    )  # fmt: skip
    if gradients.mask is not None:
        target = block.of_mask(gradients.mask)
        target += grad_score.sum_to_size(target.shape)
    grad_score = grad_score * scale
    if gradients.weight is not None:
        block.of_entries(gradients.weight, 1).add_(weight_gradient(grad_score, energy))
    if gradients.query is not None or gradients.key is not None:
        add_feature_gradients(block, gradients, energy, grad_score, weight, shield)


def score_gradient(
    weights: Tensor,
    out_and_value: tuple[Tensor, Tensor] | None,
    factors: Tensor | None,
    attended: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
) -> Tensor:
    """G of equation 9; ``out_and_value`` is the upstream gradient of out, and the values."""
    total = torch.zeros_like(weights)
    if out_and_value is not None:
        total = product(out_and_value[0], out_and_value[1].mT)
        if factors is not None:
            total = total * factors
    if grad_weights is not None:
        total = total + grad_weights
    if attended is not None:
        total = torch.where(attended, total, 0.0)
    delta = (weights * total).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_score = weights * (total - delta)
    return grad_score if attended is None else torch.where(attended, grad_score, 0.0)


def _add_value_gradient(
    target: Tensor, kept: Tensor, grad_out: Tensor, attended: Tensor | None
) -> None:
    """Equation 12."""
    if attended is not None and not is_finite(grad_out.sum()):
        target += weighted_sum(kept.mT, grad_out, attended.mT)
    elif kept.shape[-2] == 1:
        target.addcmul_(kept.mT, grad_out)
    else:
        target += kept.mT @ grad_out


def add_feature_gradients(
    block: Block,
    gradients: Gradients,
    energy: Tensor,
    grad_score: Tensor,
    weight: Tensor,
    shield: Tensor | None,
) -> None:
    """Equation 10; overwrites the energies, the largest temporary."""
    slope = torch.addcmul(energy.new_ones(()), energy, energy, value=-1, out=energy)
    slope.mul_(weight[..., None, None, :]).mul_(grad_score.unsqueeze(-1))
    if shield is not None:
        slope = shielded(slope, shield)
    if gradients.query is not None:
        torch.sum(slope, -2, out=block.of_rows(gradients.query))
    if gradients.key is not None:
        target = block.of_keys(gradients.key)
        target += slope.squeeze(-3) if slope.shape[-3] == 1 else slope.sum(-3)


class Block(NamedTuple):
    """Rows and keys of some entries, computed at one time."""

    dim: int  # batch dim that is divided, counted from the last, which is 1
    entries: tuple[int, int]  # range of this dim
    rows: tuple[int, int]
    keys: tuple[int, int]

    def of_entries(self, tensor: Tensor, rank: int) -> Tensor:
        """The part of the entries; ``rank`` is the number of dims that are not of the batch."""
        dim = tensor.dim() - rank - self.dim
        if dim < 0 or tensor.shape[dim] == 1:
            return tensor
        first, last = self.entries
        return tensor.narrow(dim, first, last - first)

    def of_rows(self, tensor: Tensor) -> Tensor:
        return self.of_entries(tensor, 2)[..., slice(*self.rows), :]

    def of_keys(self, tensor: Tensor) -> Tensor:
        return self.of_entries(tensor, 2)[..., slice(*self.keys), :]

    def of_pairs(self, tensor: Tensor) -> Tensor:
        return self.of_entries(tensor, 2)[..., slice(*self.rows), slice(*self.keys)]

    def of_mask(self, attn_mask: Tensor) -> Tensor:
        return mask_block(self.of_entries(attn_mask, 2), self.rows, self.keys)

    def of_batch(self, batch: torch.Size) -> torch.Size:
        sizes = list(batch)
        if self.dim <= len(sizes):
            sizes[-self.dim] = self.entries[1] - self.entries[0]
        return torch.Size(sizes)

    def inputs(self, inputs: Inputs) -> Inputs:
        query, key, value, weight = inputs
        return Inputs(
            self.of_rows(query), self.of_keys(key), self.of_keys(value), self.of_entries(weight, 1)
        )

    def masks(self, masking: Masking, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The part of the dense mask, and the attended pairs; None where all are."""
        attn_mask, lengths, starts, table = masking[:4]
        if attn_mask is not None:
            attn_mask = self.of_mask(attn_mask)
        masking = masking._replace(
            lengths=None if lengths is None else self.of_entries(lengths, 1),
            starts=None if starts is None else self.of_entries(starts, 1),
            block_table=None if table is None else self.of_entries(table, 2),
        )
        allowed = allowed_pairs(masking, self.rows, self.keys, device)
        return attn_mask, attended_pairs(attn_mask, allowed)

    def factors(self, options: Options, batch: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """The dropout factors D of equation 15."""
        seed, dropout_p, _ = options
        if seed is None:
            return None
        numbers = torch.arange(batch.numel(), device=seed.device).reshape(batch)
        keep = keep_mask(
            self.of_entries(seed, 0), (), self.rows, self.keys, dropout_p,
            entries=self.of_entries(numbers, 0),
        )  # fmt: skip
        return keep_factors(keep, dropout_p, dtype)


def blocks_of(call: Call, batch: torch.Size, pairs: int | None = None) -> Iterator[Block]:
    """Blocks of all rows of some entries, or of some rows of one entry: of up to ``pairs`` pairs,
    or of as many as fit with their energies."""
    query, key, value, _ = call.inputs
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if batch.numel() == 0 or num_queries == 0 or num_keys == 0:
        return
    # The first dim of more than one entry is divided.
    dim = next((len(batch) - i for i, size in enumerate(batch) if size > 1), len(batch) + 1)
    count = batch[-dim] if dim <= len(batch) else 1
    masking = call.masking
    ranges = KeyRanges(masking, dim, count, num_keys)
    left, right = masking.left, masking.right
    span = num_keys if left < 0 or right < 0 else min(num_keys, left + right + 1)
    # Masked values that are not finite take a tensor (..., Lq, Lk, Dv).
    masked = left >= 0 or right >= 0 or any(x is not None for x in masking[:4])
    features = max(query.shape[-1], value.shape[-1] if masked else 1, 1)
    unit = batch.numel() // count * (1 if pairs else features)
    threads = torch.get_num_threads() if query.device.type == "cpu" else _MOST_THREADS
    elements = pairs or _BLOCK_ELEMENTS * min(threads, _MOST_THREADS)
    rows_at_once = min(max(1, elements // (unit * span)), num_queries)
    entries_at_once = max(1, elements // (unit * span * num_queries))
    for entry in range(0, count, entries_at_once):
        entries = entry, min(entry + entries_at_once, count)
        row = 0
        while row < num_queries:
            some = rows_at_once
            while row + some < num_queries:  # where ranges are short, more rows fit
                start, stop = ranges.of(entries, (row, min(row + 2 * some, num_queries)))
                if 2 * some * (stop - start) * unit > elements:
                    break
                some *= 2
            rows = row, min(row + some, num_queries)
            keys = ranges.of(entries, rows)
            if keys[0] < keys[1]:
                yield Block(dim, entries, rows, keys)
            row = rows[1]


class KeyRanges:
    """The smallest ranges of keys outside of which no row of a block may attend."""

    def __init__(self, masking: Masking, dim: int, count: int, num_keys: int) -> None:
        self.left, self.right, self.keys = masking.left, masking.right, num_keys

        def listed(numbers: Tensor | None, reduce: Callable[..., Tensor]) -> list[list[int]]:
            """For each index of the divided dim, the numbers of the rows, or one for all."""
            if numbers is None:
                return []
            numbers = torch.atleast_1d(numbers).clamp(0, num_keys)
            divided = numbers.dim() - 1 - dim
            numbers = numbers.movedim(divided, 0) if divided >= 0 else numbers.unsqueeze(0)
            lists = reduce(numbers.reshape(numbers.shape[0], -1, numbers.shape[-1]), 1).tolist()
            return lists * count if len(lists) == 1 else lists

        self.starts = listed(masking.starts, torch.amin)
        self.stops = listed(masking.lengths, torch.amax)

    def of(self, entries: tuple[int, int], rows: tuple[int, int]) -> tuple[int, int]:
        first, last = rows[0], rows[1] - 1
        start = max(first - self.left, 0) if self.left >= 0 else 0
        stop = min(last + self.right + 1, self.keys) if self.right >= 0 else self.keys
        own = slice(*entries)
        if self.starts:
            start = max(start, min(min(_part(x, rows)) for x in self.starts[own]))
        if self.stops:
            stop = min(stop, max(max(_part(x, rows)) for x in self.stops[own]))
        return min(start, stop), stop


def _part(numbers: list[int], rows: tuple[int, int]) -> list[int]:
    return numbers if len(numbers) == 1 else numbers[slice(*rows)]
