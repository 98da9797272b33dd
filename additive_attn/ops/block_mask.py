"""Converts a BlockMask of torch.nn.attention.flex_attention to a table and tiles (spec.masks)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from additive_attn.ops.checks import has_values, require_one_device

# mask_mod is evaluated for about so many pairs at one time, which bounds its temporaries.
_PAIRS = 2**20


def is_block_mask(mask: Any) -> bool:
    return type(mask).__name__ == "BlockMask" and hasattr(mask, "kv_num_blocks")


def block_terms(
    mask: Any, query: Tensor, batch: torch.Size, rows: int, keys: int
) -> tuple[Tensor, Tensor]:
    """Returns the block table of ``mask`` and the tiles of its partial blocks. In a graph, where
    the number of tiles cannot depend on data, every block has a tile."""
    _check(mask, query, batch, rows, keys)
    size = mask.BLOCK_SIZE
    columns = -(-keys // size[1])
    plain = _passes_all(mask.mask_mod)
    partial = _kept(mask.kv_num_blocks, mask.kv_indices, columns)
    table = partial.int()
    if mask.full_kv_num_blocks is not None:
        full = _kept(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
        partial = partial & ~full
        table = full.int() + partial.int()
    if plain:
        tiles = torch.empty((0, *size), dtype=torch.bool, device=table.device)
        return _aligned(table, batch), tiles
    readable = has_values(table)
    if readable:
        places = partial.nonzero().int().unbind(-1)
        numbers = torch.arange(len(places[0]), dtype=torch.int32, device=table.device)
        table[partial] = numbers + 2
    else:
        shape = table.shape
        numbers = torch.arange(table.numel(), dtype=torch.int32, device=table.device)
        places = tuple(
            torch.arange(n, dtype=torch.int32, device=table.device)
            .reshape(-1, *(1,) * (3 - d)).expand(shape).reshape(-1)
            for d, n in enumerate(shape)
        )  # fmt: skip
        table = torch.where(partial, numbers.reshape(shape) + 2, table)
    tiles = _tiles(mask.mask_mod, places, size, rows, keys, readable)
    return _aligned(table, batch), tiles


def _passes_all(mask_mod: Any) -> bool:
    # Imported here, since it imports the compiler; whoever created a BlockMask has done so.
    from torch.nn.attention.flex_attention import noop_mask

    return mask_mod is noop_mask


def _kept(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Returns which blocks are listed: bool (B, H, row blocks, key blocks)."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    listed = (slots < counts.unsqueeze(-1)) & (indices >= 0) & (indices < columns)
    kept = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    at = torch.where(listed, indices, columns).long()
    kept = kept.scatter(-1, at, True)[..., :columns]
    return kept.reshape((1,) * (4 - kept.dim()) + kept.shape)


def _tiles(
    mask_mod: Callable[..., Tensor], places: tuple[Tensor, ...], size: tuple[int, int], rows: int,
    keys: int, in_parts: bool,
) -> Tensor:  # fmt: skip
    """Evaluates ``mask_mod`` for the pairs of some blocks: (blocks, rows, keys) of a block. A pair
    beyond the last row or key gets the result of that row or key."""
    entry, head, row_block, key_block = places
    own = [torch.arange(n, dtype=torch.int32, device=entry.device) for n in size]
    row = (row_block[:, None] * size[0] + own[0]).clamp(max=rows - 1)
    key = (key_block[:, None] * size[1] + own[1]).clamp(max=keys - 1)
    each: Any = torch.vmap(mask_mod, (None, None, None, 0))
    each = torch.vmap(torch.vmap(each, (None, None, 0, None)), (0, 0, 0, 0))
    if not in_parts:
        return _checked(each(entry, head, row, key))
    tiles = torch.empty((len(entry), *size), dtype=torch.bool, device=entry.device)
    step = max(1, _PAIRS // (size[0] * size[1]))
    for i in range(0, len(entry), step):
        part = slice(i, i + step)
        tiles[part] = _checked(each(entry[part], head[part], row[part], key[part]))
    return tiles


def _checked(tiles: Tensor) -> Tensor:
    if tiles.dtype != torch.bool:
        raise TypeError(
            f"mask_mod of the BlockMask returns {tiles.dtype}, but must return a bool tensor: "
            "True = attend."
        )
    return tiles


def _aligned(table: Tensor, batch: torch.Size) -> Tensor:
    """Reshapes the table so that its batch is the first leading dim and its heads are the last."""
    if len(batch) < 2:
        return table.flatten(0, 1) if batch else table[0, 0]
    return table.reshape(table.shape[0], *(1,) * (len(batch) - 2), *table.shape[1:])


def _check(mask: Any, query: Tensor, batch: torch.Size, rows: int, keys: int) -> None:
    if tuple(mask.seq_lengths) != (rows, keys):
        raise ValueError(
            f"attn_mask is a BlockMask for {mask.seq_lengths[0]} queries and "
            f"{mask.seq_lengths[1]} keys, but there are {rows} queries and {keys} keys. Create it "
            f"with Q_LEN={rows} and KV_LEN={keys}."
        )
    blocks, needed = mask.kv_num_blocks.shape[-1], -(-rows // mask.BLOCK_SIZE[0])
    if blocks != needed:
        raise ValueError(
            f"attn_mask is a BlockMask of {blocks} blocks of {mask.BLOCK_SIZE[0]} queries, but "
            f"{rows} queries have {needed}. If the mask was sliced, set its seq_lengths too."
        )
    if mask.kv_num_blocks.device != query.device:
        require_one_device(query=query, attn_mask=mask.kv_num_blocks)
    own = mask.kv_num_blocks.shape[:-1]
    own = (1,) * (2 - len(own)) + tuple(own)
    if len(batch) < 2:
        fits = own[0] * own[1] == 1 or (len(batch) == 1 and own[1] == 1 and own[0] == batch[0])
    else:
        fits = own[0] in (1, batch[0]) and own[1] in (1, batch[-1])
    if not fits:
        _refuse_batch(own, batch)


def _refuse_batch(own: tuple[int, ...], batch: torch.Size) -> NoReturn:
    raise ValueError(
        f"attn_mask is a BlockMask of batch {own[0]} and {own[1]} heads, but the leading dims of "
        f"the call are {tuple(batch)}: its batch is the first of them and its heads the last of "
        "several; either may be 1 (B=None, H=None)."
    )
