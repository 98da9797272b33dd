"""Tests every feature in every dtype on every path by the accuracy rule. The table in
docs/features.md shows which of them passed."""

from __future__ import annotations

import paths
import pytest
import test_location_features
import test_location_term
import test_second_order
import test_step_operator
import torch
from oracle import (
    OUTPUTS,
    check_against_plain,
    fused,
    fused_scores,
    generator,
    make,
    plain,
    plain_masked,
    plain_scores,
)
from paths import DEVICE
from torch.nn.attention.flex_attention import create_block_mask

from additive_attn.spec.dropout import draw_seed, keep_mask

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.core,
    pytest.mark.interpreter,
    pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
    ),
]
BATCH, ROWS, KEYS = (2, 2), 5, 19
ROW, KEY = torch.arange(ROWS, device=DEVICE)[:, None], torch.arange(KEYS, device=DEVICE)
STARTS, LENGTHS = torch.tensor([0, 4], device=DEVICE), torch.tensor([19, 7], device=DEVICE)
FIRST, LAST = torch.tensor([[0, 3, 5, 9, 18], [2] * ROWS], device=DEVICE), LENGTHS[:, None]
RANDOM = torch.rand(*BATCH, ROWS, KEYS, generator=generator(3), device=DEVICE)
BLOCK_MASK = create_block_mask(
    lambda b, h, q, k: (q + 3 * h + 6 * b) // 4 != k // 8, *BATCH, ROWS, KEYS, device=DEVICE,
    BLOCK_SIZE=(4, 8),
)  # fmt: skip
BLOCKS = (ROW + torch.tensor([[0, 3], [6, 9]], device=DEVICE)[..., None, None]) // 4 != KEY // 8

# The options of a call, and the pairs that are attended.
MASKING = {
    "none": ({}, None),
    "bool mask": ({"attn_mask": RANDOM < 0.6}, RANDOM < 0.6),
    "lengths": ({"lengths": LENGTHS}, KEY < LENGTHS[:, None, None, None]),
    "starts": ({"starts": STARTS}, KEY >= STARTS[:, None, None, None]),
    "ranges per query": (
        {"starts": FIRST, "lengths": LAST.expand(2, ROWS)},
        ((KEY >= FIRST[..., None]) & (KEY < LAST[..., None]))[:, None],
    ),
    "is_causal": ({"is_causal": True}, KEY <= ROW),
    "window": ({"window": (2, 3)}, (KEY >= ROW - 2) & (KEY <= ROW + 3)),
    "BlockMask": ({"attn_mask": BLOCK_MASK}, BLOCKS),
}


def cases(dtype, rows=ROWS, heads=True, broadcast=False):
    seeds = range(1 if paths.current() == "triton" else 3)  # the interpreter is slow
    made = [make(BATCH, rows, KEYS, 8, 6, heads=heads, dtype=dtype, seed=s) for s in seeds]
    for case in made if broadcast else ():
        case |= {name: case[name][:, :1] for name in ("key", "value")}
    return made


# The formula that each function is compared with, and the outputs that are compared.
FORMULAS = {fused: (plain_masked, OUTPUTS), fused_scores: (plain_scores, ("scores",))}
both = pytest.mark.parametrize("ours", FORMULAS)


@both
@pytest.mark.parametrize("name", MASKING)
def test_masking(name, ours, dtype):
    (options, allowed), (theirs, upstream_of) = MASKING[name], FORMULAS[ours]

    def formula(inputs, scale):
        return theirs(inputs, attn_mask=allowed, scale=scale)

    def function(inputs, scale):
        return ours(inputs, scale=scale, **options)

    formula.__name__ = f"{theirs.__name__} with {name}"  # the key of stored results
    check_against_plain(cases(dtype), function=function, formula=formula, upstream_of=upstream_of)


@both
def test_shapes_and_float_masks(ours, dtype):
    theirs, names = FORMULAS[ours]
    judged = {"function": ours, "formula": theirs, "upstream_of": names}
    for given in (cases(dtype, 1), cases(dtype, heads=False), cases(dtype, broadcast=True)):
        check_against_plain(given, **judged)
    check_against_plain(cases(dtype), attn_mask=(3 * RANDOM).to(dtype), **judged)


def test_dropout(dtype):
    def function(inputs, **options):
        torch.manual_seed(5)
        return fused(inputs, **options)

    def dropped(inputs, *, dropout_p, scale):
        torch.manual_seed(5)
        keep = keep_mask(draw_seed(torch.device(DEVICE)), BATCH, (0, ROWS), (0, KEYS), dropout_p)
        return plain(**inputs, keep=keep, dropout_p=dropout_p, scale=scale)

    check_against_plain(cases(dtype), function=function, formula=dropped, dropout_p=0.4)


@pytest.mark.parametrize("kind", test_second_order.MAPS)
def test_second_order_and_forward_mode(kind, dtype):
    whole = cases(dtype)
    test_second_order.check(kind, whole)
    scored = [test_second_order.scored(case) for case in whole]
    test_second_order.check(kind, scored, fused_scores, plain_scores)


# Steps.

STEP_MASKS = {
    "lengths": torch.tensor([[[19], [4]], [[7], [0]]], device=DEVICE),
    "attn_mask": RANDOM[..., :1, :] < 0.6,
}


@pytest.mark.parametrize("name", ["none", *STEP_MASKS])
def test_steps(name, dtype):
    options = {name: STEP_MASKS[name]} if name in STEP_MASKS else {}
    check_against_plain(cases(dtype, 1), function=test_step_operator.step, **options)


def test_steps_with_keys_of_sixteen_bits(dtype):
    """The queries are in float32. In the other tests keys have the dtype of the queries."""
    narrow = dtype.itemsize == 2
    function = test_step_operator.with_wide_queries if narrow else test_step_operator.step
    check_against_plain(cases(dtype, 1, heads=False), function=function)


def test_steps_of_beams_and_dropout(dtype):
    check_against_plain(
        cases(dtype, 1, heads=False, broadcast=True), function=test_step_operator.step
    )
    seed = torch.tensor(7, device=DEVICE)
    keep = keep_mask(seed, BATCH, (0, 1), (0, KEYS), 0.4)

    def function(inputs, scale):
        return test_step_operator.step(inputs, seed=seed, dropout_p=0.4, scale=scale)

    def dropped_step(inputs, scale):
        return plain(**inputs, keep=keep, dropout_p=0.4, scale=scale)

    check_against_plain(cases(dtype, 1), function=function, formula=dropped_step)


@pytest.mark.parametrize("features", [3, 1], ids=["location", "coverage"])
def test_steps_with_a_term_inside(features, dtype):
    for options in (
        {}, {"lengths": STEP_MASKS["lengths"]}, {"attn_mask": STEP_MASKS["attn_mask"]},
        {"seed": torch.tensor(7, device=DEVICE), "dropout_p": 0.4},
    ):  # fmt: skip
        inputs = test_location_term.make(BATCH, KEYS, 8, features, dtype=dtype)
        test_location_term.check(inputs, **options)


def test_location_features_of_earlier_weights(dtype, path):
    test_location_features.check((2, 2, KEYS, 3, 5), dtype)
