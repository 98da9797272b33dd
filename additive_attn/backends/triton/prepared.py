"""The tensors that ``prepare.py`` stores and the score kernels load."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PreparedWeight(NamedTuple):
    """``weight`` (outer, inner, HP): w divided by a power of two, so that abs(w) < 2, and padded
    with zeros, in the computing dtype. ``score_scale`` (outer, inner, 2): two factors whose
    product is that power of two times the scale of the scores, NaN where a weight is not finite.
    Multiplied one after the other, they overflow only where the score does. ``quad_weight``
    (outer, inner, HP): abs(w) in the order of the quads of the matched form. ``tickets``
    (TICKETS,): zeros, for the programs of one kernel of the call (``merging.is_last``)."""

    weight: Tensor
    score_scale: Tensor
    quad_weight: Tensor
    tickets: Tensor


class PreparedRows(NamedTuple):
    """Prepared queries (e^{-2q}) or keys (e^{2k}). ``exponential`` (outer, inner, LP, HP): 1 in
    rows that are not within SAFE and in the rows beyond the last, so that loops need no bounds;
    ``quads``: the same in their layout, with c and g of two matches (queries) or p of four (keys)
    for the matched form, and SPARE more rows, flat; ``size`` (outer, inner, LP): max |x|, Inf for
    NaN; ``correction`` (outer, inner, LP, 2): of the difference form and of the matched form, with
    -d; ``flags`` (outer, inner, LP / GROUP): of keys beside ``quads``; ``sketch`` (outer, inner,
    LP, 32), in float16: sums of w x / |w| over every 32nd feature, with random signs; ``distance``
    (outer, inner, LP): the square of a key's sketch, and what twice its product with a query's and
    this square must stay below for a pair to be opposite. A tensor that no pass will read has no
    elements."""

    exponential: Tensor
    quads: Tensor
    size: Tensor
    correction: Tensor
    flags: Tensor
    distance: Tensor
    sketch: Tensor


class Prepared(NamedTuple):
    """Queries and keys are None in float64, whose direct form needs no exponentials."""

    weight: PreparedWeight
    query: PreparedRows | None
    key: PreparedRows | None
