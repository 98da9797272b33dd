"""The one description of masking that every backend consumes.

Four parts compose by "and":

- Query row ``i`` may attend to the keys of one interval, from ``max(i - left, starts_i)`` up to
  and without ``min(i + right + 1, lengths_i)``. A negative ``left`` or ``right`` is unbounded;
  causal attention is ``right = 0``.
- A block table says for each block of rows and keys whether no pair is attended (0), all are (1),
  or those of tile ``t - 1`` of ``block_tiles`` (1 + t). Any other number counts as 0. Blocks at
  the ends may reach beyond the last row and key.
- A dense ``attn_mask``: bool, True = attend; or float, added to the scores, -inf = masked.

The functions compute the masks of a block of rows and keys without those of the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from additive_attn.spec.call import Masking


def check_masking(
    masking: Masking, batch: torch.Size, num_rows: int, num_keys: int, device: torch.device
) -> None:
    """Raises for types and shapes that would silently give wrong results, since the operators are
    public. Lengths, starts and tables may hold any numbers."""
    attn_mask, lengths, starts, table, tiles = masking[:5]
    for name, numbers in (("lengths", lengths), ("starts", starts)):
        if numbers is not None:
            _check(name, numbers, torch.int64, device, numbers.shape[:-1], batch)
            if numbers.dim() and numbers.shape[-1] not in (1, num_rows):
                raise RuntimeError(
                    f"The last dim of {name} is {numbers.shape[-1]}; it must be 1 or the number "
                    f"of query rows, {num_rows}."
                )
    if (table is None) != (tiles is None):
        raise RuntimeError("block_table and block_tiles come together.")
    if table is not None and tiles is not None:
        _check("block_tiles", tiles, torch.bool, device, batch[:0], batch)
        if tiles.dim() != 3 or 0 in tiles.shape[1:]:
            raise RuntimeError(
                f"block_tiles has shape {tuple(tiles.shape)}; it must be (tiles, rows, keys), "
                "which also gives the size of a block."
            )
        _check("block_table", table, torch.int32, device, table.shape[:-2], batch)
        blocks = [
            -(-size // of) for size, of in zip((num_rows, num_keys), tiles.shape[1:], strict=True)
        ]
        if list(table.shape[-2:]) != blocks:
            raise RuntimeError(
                f"block_table has shape {tuple(table.shape)}; it must be (..., {blocks[0]}, "
                f"{blocks[1]}) for blocks of {tiles.shape[1]} rows and {tiles.shape[2]} keys."
            )
    if attn_mask is not None:
        dtype = attn_mask.dtype if attn_mask.is_floating_point() else torch.bool
        _check("attn_mask", attn_mask, dtype, device, attn_mask.shape[:-2], batch)
        full = (num_rows, num_keys)[max(2 - attn_mask.dim(), 0) :]
        if any(x not in (1, y) for x, y in zip(attn_mask.shape[-2:], full, strict=True)):
            raise RuntimeError(f"attn_mask must broadcast to (..., {num_rows}, {num_keys}).")


def _check(
    name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, leading: torch.Size,
    batch: torch.Size,
) -> None:  # fmt: skip
    if tensor.dtype != dtype or tensor.device != device or tensor.layout is not torch.strided:
        or_float = " or floating point" if name == "attn_mask" else ""
        raise RuntimeError(
            f"{name} is {tensor.dtype} of layout {tensor.layout} on {tensor.device}; it must be a "
            f"dense tensor of {dtype}{or_float} on {device}."
        )
    full = batch[len(batch) - len(leading) :]
    if len(leading) > len(batch) or any(
        x not in (1, y) for x, y in zip(leading, full, strict=True)
    ):
        raise RuntimeError(
            f"The leading dims of {name} are {tuple(leading)}; they must broadcast to "
            f"{tuple(batch)}."
        )


def allowed_pairs(
    masking: Masking, rows: tuple[int, int], keys: tuple[int, int], device: torch.device,
    keep: bool = False,
) -> Tensor | None:  # fmt: skip
    """Returns which pairs of a block the intervals and the block table allow, ``(..., rows,
    keys)``, rows or 1 where all are alike; None if they allow all. ``keep``: positions and windows
    are cached for later calls. Only for few pairs on the CPU, outside of tracing."""
    _, lengths, starts, table, tiles, left, right = masking
    allowed = interval_mask(lengths, starts, left, right, rows, keys, device, keep)
    if table is None or tiles is None:
        return allowed
    kept = block_mask(table, tiles, rows, keys)
    return kept if allowed is None else kept & allowed


def interval_mask(
    lengths: Tensor | None,
    starts: Tensor | None,
    left: int,
    right: int,
    rows: tuple[int, int],
    keys: tuple[int, int],
    device: torch.device,
    keep: bool = False,
) -> Tensor | None:
    """The same for the intervals alone."""
    inside = None
    if not (lengths is starts is None):
        key = (_kept_positions if keep else _positions)(keys, device)
        if lengths is not None:
            inside = key < _of_rows(lengths, rows).unsqueeze(-1)
        if starts is not None:
            after = key >= _of_rows(starts, rows).unsqueeze(-1)
            inside = after if inside is None else inside & after
    if left < 0 and right < 0:
        return inside
    window = (_kept_window if keep else _window)(left, right, rows, keys, device)
    return window if inside is None else inside & window


def _positions(keys: tuple[int, int], device: torch.device) -> Tensor:
    return torch.arange(*keys, device=device)


def _window(
    left: int, right: int, rows: tuple[int, int], keys: tuple[int, int], device: torch.device
) -> Tensor:
    """Returns the pairs in a window with a bounded side."""
    # Differences of positions: row + right would overflow for a huge right.
    after = _positions(keys, device) - _positions(rows, device).unsqueeze(-1)
    if left < 0:
        return after <= right
    return after >= -left if right < 0 else (after >= -left) & (after <= right)


def _kept(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Caches tensors. They are no inference tensors, since other calls save them for backward."""
    return functools.lru_cache(maxsize=16)(torch.inference_mode(False)(function))


_kept_positions, _kept_window = _kept(_positions), _kept(_window)


def _of_rows(numbers: Tensor, rows: tuple[int, int]) -> Tensor:
    if numbers.dim() == 0:
        return numbers.unsqueeze(0)
    first, last = rows
    size = numbers.shape[-1]
    return numbers if size == 1 or (first == 0 and last == size) else numbers[..., first:last]


def block_mask(
    table: Tensor, tiles: Tensor, rows: tuple[int, int], keys: tuple[int, int]
) -> Tensor:
    """The same for the block table alone, bool ``(..., rows, keys)``."""
    count, block_rows, block_keys = tiles.shape
    row = torch.arange(*rows, device=table.device)
    key = torch.arange(*keys, device=table.device)
    row_block = row.div(block_rows, rounding_mode="floor")
    key_block = key.div(block_keys, rounding_mode="floor")
    code = table.index_select(-2, row_block).index_select(-1, key_block)
    if count == 0:
        return code == 1
    tile = (code - 2).clamp(0, count - 1).long()
    inside = tiles[tile, (row % block_rows)[:, None], key % block_keys]
    return torch.where((code > 1) & (code < count + 2), inside, code == 1)


def mask_block(attn_mask: Tensor, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """Returns the view of ``attn_mask`` for a block; broadcast dims stay as they are."""
    if attn_mask.dim() > 0 and attn_mask.shape[-1] != 1:
        attn_mask = attn_mask[..., slice(*keys)]
    if attn_mask.dim() > 1 and attn_mask.shape[-2] != 1:
        attn_mask = attn_mask[..., slice(*rows), :]
    return attn_mask
