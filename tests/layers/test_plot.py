"""plot_attention returns matplotlib Axes that show the weights."""

from __future__ import annotations

import pytest
import torch

from additive_attn import AdditiveAttention, plot_attention

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def test_image_holds_the_weights():
    x = torch.randn(4, 6)
    _, weights = AdditiveAttention(6, 8)(x, x)
    axes = plot_attention(weights.detach(), list("abcd"), list("wxyz"), title="alignment")
    shown = torch.as_tensor(axes.images[0].get_array().filled(-1.0)).float()
    torch.testing.assert_close(shown, weights.detach())
    assert [label.get_text() for label in axes.get_xticklabels()] == list("abcd")
    assert axes.get_title() == "alignment"


def test_takes_weights_as_they_come():
    """With a gradient, in half precision, of one batch entry, with empty rows."""
    weights = torch.rand(1, 3, 5, 7, requires_grad=True).bfloat16()
    plot_attention(weights)
    plot_attention(weights, head=1)
    assert plot_attention(weights, head="grid").size >= 3
    plot_attention(torch.zeros(5, 7))
    plot_attention(torch.rand(5, 7), style="alignment", source_length=3)


BAD = {
    # what is passed -> (exception, what the sentence names)
    "None": (dict(weights=None), TypeError, "weights are a NoneType"),
    "complex": (dict(weights=torch.ones(2, 3) * 1j), TypeError, "weights are torch.complex64"),
    "meta": (dict(weights=torch.ones(2, 3, device="meta")), TypeError, "weights are on meta"),
    "head": (dict(head=True), ValueError, "head is True"),
    "no ticks": (dict(max_ticks=0, source_tokens=list("abc")), ValueError, "max_ticks is 0"),
    "axes": (dict(ax=3), TypeError, "ax is 3, but must be matplotlib Axes"),
}


@pytest.mark.parametrize("changes,exception,sentence", BAD.values(), ids=BAD.keys())
def test_errors_are_sentences(changes, exception, sentence):
    with pytest.raises(exception, match=sentence):
        plot_attention(**dict(weights=torch.rand(2, 2, 3)) | changes)


def test_draws_into_given_axes():
    from matplotlib import pyplot

    _, axes = pyplot.subplots()
    assert plot_attention(torch.eye(3), ax=axes) is axes
    assert len(axes.images) == 1
