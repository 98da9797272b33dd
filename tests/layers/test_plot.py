"""plot_attention returns matplotlib Axes that show the weights."""

from __future__ import annotations

import itertools

import numpy
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
    """Weights may have a gradient, be in half precision, of one batch entry, or have empty
    rows."""
    weights = torch.rand(1, 3, 5, 7, requires_grad=True).bfloat16()
    plot_attention(weights, head="mean")
    plot_attention(weights, head=1)
    assert plot_attention(weights, head="grid").size >= 3
    plot_attention(torch.zeros(5, 7))
    plot_attention(torch.rand(5, 7), style="alignment", source_length=3)


@pytest.mark.parametrize("change", [
    lambda w: w[::-1, ::-2], lambda w: w.astype(">f4"), lambda w: numpy.broadcast_to(w[0], (3, 7)),
])  # fmt: skip
def test_arrays_of_any_layout(recwarn, change):
    weights = change(numpy.random.rand(5, 7))
    found = shown(plot_attention(weights))
    torch.testing.assert_close(found, torch.tensor(weights.astype("f4")))
    assert not recwarn


@pytest.mark.parametrize("integer", [numpy.int64, torch.tensor])
def test_numbers_that_argmax_returns(integer):
    weights = torch.rand(2, 3, 5, 7)
    axes = plot_attention(weights, batch=integer(1), head=integer(2), max_ticks=integer(3))
    torch.testing.assert_close(shown(axes), weights[1, 2])


def shown(axes):
    return torch.as_tensor(axes.images[0].get_array().filled(-1.0)).float()


CHOICES = {
    # shape, options -> which part of the weights is drawn
    "one sequence": ((1, 5, 7), {}, lambda w: w[0]),
    "of a batch": ((4, 5, 7), {"batch": 2}, lambda w: w[2]),
    "of a batch with one head": ((4, 1, 5, 7), {"batch": -1}, lambda w: w[-1, 0]),
    "a head": ((4, 5, 7), {"head": 1}, lambda w: w[1]),
    "mean of heads": ((4, 5, 7), {"head": "mean"}, lambda w: w.mean(0)),
    "batch and heads": ((2, 3, 5, 7), {"batch": 1, "head": 2}, lambda w: w[1, 2]),
    "more dims of size 1": ((1, 1, 1, 5, 7), {}, lambda w: w[0, 0, 0]),
}


@pytest.mark.parametrize("shape,options,part", CHOICES.values(), ids=CHOICES.keys())
def test_what_is_drawn_of_a_batch_and_of_heads(shape, options, part):
    weights = torch.rand(shape) + 0.1
    torch.testing.assert_close(shown(plot_attention(weights, **options)), part(weights))


def test_steps_of_a_decoder():
    layer = AdditiveAttention(6, 8)
    memory = layer.project(torch.randn(3, 9, 6))
    steps = [layer.step(torch.randn(3, 6), memory)[1] for _ in range(5)]
    expected = torch.stack([step[1] for step in steps]).detach()
    torch.testing.assert_close(shown(plot_attention([step[1] for step in steps])), expected)
    torch.testing.assert_close(shown(plot_attention(steps, batch=1)), expected)


def overlapping(axis):
    """Whether two labels of an axis of a drawn figure overprint each other."""
    renderer = axis.figure.canvas.get_renderer()
    boxes = [
        label.get_window_extent(renderer) for label in axis.get_ticklabels() if label.get_text()
    ]
    return any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    "heads,length,token",
    [(8, 40, "the"), (2, 40, "x" * 40), (1, 40, "x" * 40), (1, 300, "the"), (7, 1, "the")],
)
def test_labels_do_not_overlap(recwarn, heads, length, token):
    tokens = [token] * length
    axes = plot_attention(torch.rand(heads, length, length), tokens, tokens, head="grid")
    axes[0].figure.canvas.draw()
    assert not recwarn.list  # no warning that the layout collapses
    for each in axes:
        assert not overlapping(each.xaxis) and not overlapping(each.yaxis)
        assert each.get_position().width > 0.5 / len(axes)
    if length == 40:
        assert len(axes[0].get_yticks()) == 40


def test_a_figure_has_the_proportions_of_the_weights():
    figure = plot_attention(torch.rand(2000, 800), style="alignment").figure
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent()
    assert 2 < box.width / box.height < 3


def test_one_large_weight_does_not_darken_the_others():
    weights = torch.full((30, 30), 0.01).fill_diagonal_(0.1)
    weights[3, 7] = 0.9
    assert plot_attention(weights).images[0].get_clim() == pytest.approx((0, 0.9))
    assert plot_attention(weights, vmax="robust").images[0].get_clim() == pytest.approx((0, 0.1))
    assert plot_attention(weights, vmax=0.5).images[0].get_clim() == (0, 0.5)


@pytest.mark.parametrize(
    "weights,options,extend",
    [
        ([[0.1, 0.9]], {}, "neither"),
        ([[0.1, 0.9]], dict(vmax=0.5), "max"),
        ([[-1.0, 0.9]], {}, "min"),  # scores
        ([[-1.0, 0.9]], dict(vmax=0.5), "both"),
        ([[-torch.inf, 0.9]], {}, "neither"),  # a masked score is drawn blank
    ],
)
def test_the_colorbar_shows_what_lies_beyond_it(weights, options, extend):
    axes = plot_attention(torch.tensor(weights), **options)
    assert axes.images[0].colorbar.extend == extend


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_and_empty_rows_look_different(number):
    from matplotlib import pyplot

    weights = torch.eye(4)
    weights[1], weights[2] = 0, number
    axes = plot_attention(weights)
    axes.set_axis_off()
    axes.figure.canvas.draw()
    pixels = pyplot.np.asarray(axes.figure.canvas.buffer_rgba())
    height = pixels.shape[0]
    centre = axes.get_window_extent().x0 + 5
    colors = set()
    for row in (1, 2):
        y = axes.transData.transform((0, row))[1]
        colors.add(tuple(pixels[int(height - y), int(centre)].tolist()))
    assert colors == {(211, 211, 211, 255), (214, 38, 40, 255)}


def test_tokens_of_tensors_and_with_signs():
    axes = plot_attention(torch.rand(2, 3), torch.tensor([4, 5, 6]), ["$a$", "b\n"])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "5", "6"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"\$a\$", r"b\n"]
    tokens = ["\r\0", "\udc80", torch.tensor([1, 2])]  # as a tokenizer of bytes decodes them
    axes = plot_attention(torch.rand(2, 3), tokens)
    found = [label.get_text() for label in axes.get_xticklabels()]
    assert found == [r"\r\x00", r"\udc80", "tensor([1, 2])"]
    axes.figure.canvas.draw()


def test_characters_that_the_default_font_lacks(monkeypatch):
    """A character that another installed font has is drawn in that font; for others there is a
    warning."""
    from matplotlib import font_manager

    default, other = (
        set(font_manager.get_font(font_manager.findfont(name)).get_charmap())
        for name in ("DejaVu Sans", "STIXGeneral")
    )
    borrowed = next(chr(code) for code in sorted(other - default) if chr(code).isprintable())
    axes = plot_attention(torch.rand(1, 2), ["a", "b"], [borrowed])
    label = axes.get_yticklabels()[0]
    assert label.get_text() == borrowed and len(label.get_fontfamily()) > 1

    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    with pytest.warns(UserWarning, match="boxes for 1 character .*: 注. Install a font"):
        axes = plot_attention(torch.rand(1, 2), ["a", "注"])
    assert axes.get_xticklabels()[1].get_text() == "□"


BATCH = "Say what the first dim is: batch=0 .* as the layer returns them, and head="
BAD = {
    # what is passed -> (exception, what the sentence names)
    "None": (dict(weights=None), TypeError, "weights are a NoneType"),
    "complex": (dict(weights=torch.ones(2, 3) * 1j), TypeError, "weights are torch.complex64"),
    "meta": (dict(weights=torch.ones(2, 3, device="meta")), TypeError, "weights are on meta"),
    "no choice": (dict(), ValueError, BATCH),
    "both": (dict(batch=0, head=0), ValueError, BATCH),
    "batch and heads": (dict(weights=torch.ones(2, 2, 2, 3)), ValueError, "hold 2 sequences"),
    "heads": (dict(weights=torch.ones(2, 2, 2, 3), batch=0), ValueError, "have 2 heads"),
    "one head": (dict(weights=torch.ones(2, 3), head=1), ValueError, "have 1 head, so"),
    "head": (dict(head=True), ValueError, "head is True"),
    "batch": (dict(batch=2), ValueError, "batch is 2"),
    "five dims": (dict(weights=torch.ones(2, 2, 2, 2, 2)), ValueError, "more dims, choose one"),
    "ragged": (dict(weights=[torch.ones(2), torch.ones(3)]), TypeError, "of one shape"),
    "few tokens": (dict(head=0, source_tokens=["a"]), ValueError, "3 source .* are 1 source_tok"),
    "many tokens": (dict(head=0, target_tokens="abc"), ValueError, "2 target .* are 3 target_tok"),
    "length": (dict(head=0, source_length=4), ValueError, "source_length asks for 4"),
    "style": (dict(head=0, style="grid"), ValueError, "style is 'grid'"),
    "no ticks": (
        dict(head=0, max_ticks=0, source_tokens=list("abc")),
        ValueError,
        "max_ticks is 0",
    ),
    "no length": (dict(head=0, source_length=0), ValueError, "asks for 0 .* at least one"),
    "no range": (dict(head=0, vmin=1, vmax=0.5), ValueError, "vmax is 0.5, .* above vmin"),
    "no limit": (dict(head=0, vmin=float("nan")), ValueError, "vmin is nan"),
    "axes": (dict(head=0, ax=3), TypeError, "ax is 3, but must be matplotlib Axes"),
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
