"""A BlockMask of flex_attention gives the results of the dense mask that it represents."""

from __future__ import annotations

import pytest
import torch
from oracle import DEVICE, make, plain_masked
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask

import additive_attn.ops.block_mask as block_mask
from additive_attn import AdditiveAttention, additive_attention, additive_scores

B, HEADS, LQ, LK = 2, 3, 70, 150


def causal(b, h, q, k):
    return q + 80 >= k


def by_document(b, h, q, k):
    return q // 37 % 2 == k // 37 % 2


def by_entry(b, h, q, k):
    return (q + 10 * h + 20 * b) // 16 == k // 32


def sometimes_empty(b, h, q, k):
    return (q // 16 != 1) & (k < 90 + b)


def made(mask_mod, batch=None, heads=None, size=(16, 32), rows=LQ, keys=LK):
    return create_block_mask(
        mask_mod, batch, heads, rows, keys, device=DEVICE, BLOCK_SIZE=size
    )  # fmt: skip


MASKS = {
    "causal": (causal, None, None, (16, 32)),
    "documents": (by_document, None, None, (128, 128)),
    "every entry": (by_entry, B, HEADS, (16, 16)),
    "every sequence": (sometimes_empty, B, None, (16, 32)),
    "both": (and_masks(causal, by_document), None, None, (64, 16)),
}


def results(inputs, **options):
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, weights, lse = additive_attention(
        *leaves.values(), need_weights=True, need_lse=True, **options
    )
    scores = additive_scores(leaves["query"], leaves["key"], leaves["weight"], **options)
    outputs = out, weights, torch.where(lse.isfinite(), lse, 0.0), scores.exp()
    upstream = [torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)]


@pytest.mark.core
@pytest.mark.parametrize("name", MASKS)
def test_as_the_dense_mask(name):
    mask_mod, batch, heads, size = MASKS[name]
    inputs = make((B, HEADS), LQ, LK, 5, 4, heads=True, dtype=torch.float64)
    dense = create_mask(mask_mod, batch, heads, LQ, LK, device=DEVICE)
    mask = made(mask_mod, batch, heads, size)
    ours, theirs = results(inputs, attn_mask=mask), results(inputs, attn_mask=dense)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
    out = plain_masked({name: x for name, x in inputs.items()}, attn_mask=dense)["out"]
    torch.testing.assert_close(ours[0], out, rtol=1e-9, atol=1e-11)


def test_with_other_masks():
    inputs = make((B, HEADS), LQ, LK, 5, 4, heads=True, dtype=torch.float64)
    padding = torch.rand(B, LK, device=DEVICE) < 0.2
    others = dict(is_causal=True, lengths=[120, 60], starts=[0, 7], key_padding_mask=padding)
    dense = create_mask(by_entry, B, HEADS, LQ, LK, device=DEVICE)
    ours = results(inputs, attn_mask=made(by_entry, B, HEADS), **others)
    for mine, other in zip(ours, results(inputs, attn_mask=dense, **others), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def test_blocks_without_mask_mod():
    counts = torch.tensor([[[1, 2]]], device=DEVICE, dtype=torch.int32)
    indices = torch.tensor([[[[2, 0, 0], [0, 1, 2]]]], device=DEVICE, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=(4, 5), seq_lengths=(7, 13))
    dense = torch.zeros(7, 13, dtype=torch.bool, device=DEVICE)
    dense[:4, 10:], dense[4:, :10] = True, True
    inputs = make((1,), 7, 13)
    ours = additive_attention(*inputs.values(), attn_mask=mask)
    torch.testing.assert_close(ours, additive_attention(*inputs.values(), attn_mask=dense))
    table, tiles = block_mask.block_terms(mask, inputs["query"], torch.Size([1]), 7, 13)
    assert table.tolist() == [[[0, 0, 1], [1, 1, 0]]] and tiles.shape == (0, 4, 5)


def test_mask_mod_is_evaluated_in_partial_blocks_alone():
    seen = []

    def mask_mod(b, h, q, k):
        seen.append(1)
        return q >= k

    mask, tiles = made(mask_mod, size=(16, 16), rows=160, keys=160), None
    query = torch.zeros(160, 4, device=DEVICE)
    seen.clear()
    table, tiles = block_mask.block_terms(mask, query, torch.Size(), 160, 160)
    assert seen == [1]
    assert tiles.shape == (10, 16, 16) and tiles.sum() == 10 * 16 * 17 / 2
    assert (table == 1).sum() == 45 and (table == 0).sum() == 45


def test_derivatives_are_exact():
    inputs = [x.double().requires_grad_() for x in make((), 6, 9, 3, 2).values()]
    mask = made(lambda b, h, q, k: (q + k) % 3 > 0, size=(4, 4), rows=6, keys=9)

    def function(*tensors):
        return additive_attention(*tensors, attn_mask=mask)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled(inside):
    torch._dynamo.reset()
    inputs = make((B,), LQ, LK, 5, 4)
    mask = made(causal)

    def function(mask, *tensors):
        mask = made(causal) if inside else mask
        return additive_attention(*tensors, attn_mask=mask).square().sum()

    leaves = [[x.clone().requires_grad_() for x in inputs.values()] for _ in range(2)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for each, call in zip(leaves, (compiled, function), strict=True):
        call(mask, *each).backward()
    for ours, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_layer():
    layer = AdditiveAttention(6, 8)
    query, key = torch.randn(B, LQ, 6), torch.randn(B, LK, 6)
    dense = create_mask(causal, None, None, LQ, LK, device=DEVICE)[0, 0]
    for ours, theirs in zip(
        layer(query, key, attn_mask=made(causal)), layer(query, key, attn_mask=dense), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


QUERY = torch.zeros(2, 16, 4, device=DEVICE)
BAD = {
    "lengths": (dict(rows=20, keys=16), ValueError, "for 20 queries and 16 keys, but"),
    "heads": (dict(rows=16, keys=16, heads=3), ValueError, "of batch 1 and 3 heads"),
    "batch": (dict(rows=16, keys=16, batch=3), ValueError, "of batch 3 and 1 heads"),
}  # fmt: skip


@pytest.mark.parametrize("options,kind,sentence", BAD.values(), ids=BAD.keys())
def test_sentences(options, kind, sentence):
    with pytest.raises(kind, match=sentence):
        additive_attention(QUERY, QUERY, QUERY, QUERY[0, 0], attn_mask=made(causal, **options))


def test_a_slice_for_more_queries_than_it_has():
    mask = made(causal, size=(8, 16), rows=16, keys=16)
    part = mask[:, :, :1]
    part.mask_mod = mask.mask_mod
    # From torch 2.14 on, the slice itself stores that it is for 8 queries.
    match = (
        r"of 1 blocks of .* queries, but 16 queries have|for 8 queries and 16 keys, but there are"
    )
    with pytest.raises(ValueError, match=match):
        additive_attention(QUERY, QUERY, QUERY, QUERY[0, 0], attn_mask=part)


def test_mask_mod_by_another_name():
    """flex_attention's noop_mask is recognised as an object, not by its name."""

    def noop_mask(b, h, q, k):
        return q >= k

    mask = made(noop_mask, rows=16, keys=16)
    ours = additive_attention(QUERY, QUERY, QUERY, QUERY[0, 0], attn_mask=mask, need_lse=True)
    causal = additive_attention(QUERY, QUERY, QUERY, QUERY[0, 0], is_causal=True, need_lse=True)
    torch.testing.assert_close(ours, causal)


def test_mask_mod_of_numbers():
    mask = made(causal, rows=16, keys=16)
    mask.mask_mod = lambda b, h, q, k: q - k
    with pytest.raises(TypeError, match=r"mask_mod of the BlockMask returns torch\.int32"):
        additive_attention(QUERY, QUERY, QUERY, QUERY[0, 0], attn_mask=mask)


@pytest.mark.core
def test_dropout_counts_rows_and_keys_of_the_call():
    """Blocks that are left out do not change the random numbers of the others, forward and
    backward."""
    inputs = make((B,), LQ, LK, 5, 4, dtype=torch.float64)
    dense = create_mask(by_entry, B, None, LQ, LK, device=DEVICE)[:, 0]
    found = []
    for mask in (made(by_entry, B, None, (16, 16)), dense):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        torch.manual_seed(5)
        out = additive_attention(*leaves, attn_mask=mask, dropout_p=0.4)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert (found[0][0] != additive_attention(*inputs.values(), attn_mask=dense)).any()
