"""Measures attention with several heads, writes csv rows and prints them as a table.

    python -m benchmarks.heads                            everything (3 minutes)
    python -m benchmarks.heads --case call call-full
    python -m benchmarks.heads --table FILE.csv

All providers of a case are timed round-robin in this process. Each is compared with the plain
layer of its own sizes before anything is timed. Times are CPU times of all threads together. Rows
go to a new file in benchmarks/results/local/, which git ignores; --save replaces the rows of these
cases in the file that git tracks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from additive_attn import MultiheadAdditiveAttention, additive_attention
from benchmarks import command, rows
from benchmarks.decoders.problem import Problem, alternate
from benchmarks.rows import Row
from benchmarks.table import duration, markdown, ratio

SIZES = ("B", "L", "E", "heads")
COLUMNS = [
    *("device", "name", "threads", "isa", "torch", "additive_attn", "python", "commit", "date"),
    *("case", "what", *SIZES, "mode", "provider", "cpu_ms", "q20_ms", "q80_ms", "wall_ms"),
]
Run = Callable[[], Any]


class Pair(NamedTuple):
    """What is timed, and the plain layer that it must agree with; None for the plain layer."""

    run: Run
    plain: Run | None


@dataclass(frozen=True)
class Case:
    name: str
    what: str
    sizes: tuple[int, int, int, int]  # B, L, E and heads
    build: Callable[[tuple[int, ...], bool], dict[str, Pair]]
    slow: str  # compared with ``fused``
    bar: float
    full: bool = False

    def pairs(self, quick: bool) -> dict[str, Pair]:
        batch, length, features, heads = self.sizes
        torch.manual_seed(0)
        return self.build((batch, 16 if quick else length, features, heads), self.full)


def plain(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    energy = torch.tanh(query[..., :, None, :] + key[..., None, :, :])
    return (energy @ weight[:, None, :, None]).squeeze(-1).softmax(-1) @ value


class PlainHeads(nn.Module):
    """The plain layer in place of a MultiheadAdditiveAttention, with its parameters."""

    _qkv_same_embed_dim = False

    def __init__(self, layer: MultiheadAdditiveAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        heads, tensors = self.layer.num_heads, self.layer._projected(query, key, value)
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in tensors)
        out = plain(q, k, v, self.layer.energy_weight)
        return self.layer.out_proj(out.transpose(1, 2).flatten(-2)), None


def timed(function: Callable[..., Tensor], leaves: list[Tensor], full: bool) -> Run:
    """One call, or a call with its gradients."""
    with torch.no_grad():
        upstream = torch.randn_like(function())

    def run() -> tuple[Tensor, ...]:
        out = function()
        return out, *torch.autograd.grad(out, leaves, upstream)

    return run if full else lambda: (torch.no_grad()(function)(),)


def calls(sizes: tuple[int, ...], full: bool, alone: bool) -> dict[str, Pair]:
    """The function on views of a packed projection; beside one head of all features, or alone."""
    batch, length, features, heads = sizes
    found = {}
    for name, count in (("fused", heads), ("one head", 1))[: 1 if alone else 2]:
        packed = torch.randn(batch, length, 3, count, features // count).permute(2, 0, 3, 1, 4)
        weight = torch.randn(count, features // count) / (features // count) ** 0.5
        leaves = [x.requires_grad_() for x in (*packed.detach().unbind(0), weight)]
        state = torch.get_rng_state()
        ours = timed(lambda x=leaves: additive_attention(*x), leaves, full)
        torch.set_rng_state(state)
        found[name] = Pair(ours, timed(lambda x=leaves: plain(*x), leaves, full))
    if alone:
        found["plain"] = Pair(timed(lambda: plain(*leaves), leaves, full), None)
    return found


def layer_of(features: int, heads: int) -> MultiheadAdditiveAttention:
    return MultiheadAdditiveAttention(features, heads, batch_first=True)


def modules(sizes: tuple[int, ...], full: bool) -> dict[str, Pair]:
    """Whole layers, of several heads and of one."""
    batch, length, features, heads = sizes
    x, found = torch.randn(batch, length, features, requires_grad=True), {}
    for name, count in (("fused", heads), ("one head", 1)):
        layer = layer_of(features, count)
        leaves, pair = [x, *layer.parameters()], []
        state = torch.get_rng_state()
        for each in (layer, PlainHeads(layer)):
            torch.set_rng_state(state)
            pair.append(timed(lambda f=each: f(x, x, x, need_weights=False)[0], leaves, full))
        found[name] = Pair(*pair)
    return found


def decoder(sizes: tuple[int, ...], full: bool, whole: bool) -> dict[str, Pair]:
    """nn.TransformerDecoderLayer, causal; or the two attentions in it alone."""
    batch, length, features, heads = sizes
    mine: Any
    theirs: Any
    target, memory = (torch.randn(batch, length, features) for _ in range(2))
    mine, theirs = (
        nn.TransformerDecoderLayer(features, heads, 4 * features, 0.0, "gelu", batch_first=True)
        for _ in range(2)
    )
    mine.self_attn, mine.multihead_attn = (layer_of(features, heads) for _ in range(2))
    theirs.load_state_dict(mine.state_dict(), strict=False)
    theirs.self_attn, theirs.multihead_attn = map(
        PlainHeads, (mine.self_attn, mine.multihead_attn)
    )
    # The plain attentions share the parameters of ours, so only gradients of inputs are compared.
    leaves, pair = [target.requires_grad_(), memory.requires_grad_()], []
    state = torch.get_rng_state()
    for layer in (mine, theirs):

        def call(layer: Any = layer) -> Tensor:
            if whole:
                out: Tensor = layer(target, memory)
                return out
            x = layer.self_attn(target, target, target, need_weights=False)[0]
            out = layer.multihead_attn(x, memory, memory, need_weights=False)[0]
            return out

        torch.set_rng_state(state)
        pair.append(timed(call, leaves, full))
    return {"fused": Pair(*pair), "plain": Pair(pair[1], None)}


def _cases() -> Iterator[Case]:
    for full in (False, True):
        end = "-full" * full
        yield Case(
            f"call{end}", "the call, beside one head", (1, 1024, 128, 8),
            lambda s, f: calls(s, f, False), "one head", 0.9, full,
        )  # fmt: skip
        yield Case(
            f"layer{end}", "the layer, beside one head", (1, 1024, 128, 8), modules, "one head",
            0.9, full,
        )  # fmt: skip
        yield Case(
            f"plain{end}", "the call, beside plain heads", (1, 1024, 512, 8),
            lambda s, f: calls(s, f, True), "plain", 60.0 if not full else 30.0, full,
        )  # fmt: skip
        yield Case(
            f"attentions{end}", "both attentions of a decoder layer", (1, 1024, 256, 8),
            lambda s, f: decoder(s, f, False), "plain", 20.0, full,
        )  # fmt: skip
        yield Case(
            f"decoder{end}", "nn.TransformerDecoderLayer", (1, 1024, 256, 8),
            lambda s, f: decoder(s, f, True), "plain", 1.0, full,
        )  # fmt: skip


CASES = {case.name: case for case in _cases()}


def measure_case(case: Case, budget: float, rounds: int, quick: bool) -> Iterator[Row]:
    pairs = case.pairs(quick)
    for name, pair in pairs.items():
        if pair.plain is not None:
            Problem({"plain": pair.plain, name: pair.run}, numbered).check()
    about = rows.machine(torch.device("cpu"))
    about |= {"case": case.name, "what": f"tiny: {case.what}" if quick else case.what}
    about |= dict(zip(SIZES, case.sizes, strict=True))
    about["mode"] = "forward + backward" if case.full else "forward"
    problem = Problem({name: pair.run for name, pair in pairs.items()}, numbered)
    for provider, columns in alternate(problem, budget, rounds).items():
        yield about | {"provider": provider} | columns


def numbered(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {str(number): tensor.detach() for number, tensor in enumerate(results)}


def show(path: Path) -> None:
    found = command.shown_rows(path, "heads", CASES)
    table = [["what", "(B, L, E, heads)", "compared with", "mode", "its time", "ours", "ratio"]]
    for name, case in CASES.items():
        of = {row["provider"]: row for row in found if row["case"] == name}
        if {"fused", case.slow} <= of.keys():
            row = of["fused"]
            slow, fused = (float(of[each]["cpu_ms"]) for each in (case.slow, "fused"))
            sizes = f"({', '.join(row[key] for key in SIZES)})"
            times = [duration(slow), f"**{duration(fused)}**", ratio(slow, fused)]
            table.append([row["what"], sizes, case.slow, row["mode"], *times])
    print(markdown(table))


def main() -> None:
    parser = command.parser("heads", __doc__, CASES, samples=True)
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="print it, measure nothing")
    args = command.parsed(parser)
    if args.table is not None:
        return show(args.table)
    path = command.begin(args, "heads")

    def all_rows() -> Iterator[Row]:
        for name in args.case:
            case = CASES[name]
            found = list(measure_case(case, args.budget, args.rounds, args.quick))
            times = {row["provider"]: row["cpu_ms"] for row in found}
            reached = times[case.slow] / times["fused"]
            met = "met" if reached >= case.bar else "MISSED"
            parts = ", ".join(f"{key} {x:.4g} ms" for key, x in times.items())
            print(f"{name:<16} {parts}; {reached:.3g}x (bar {case.bar:g}x: {met})", flush=True)
            yield from found

    command.write(path, all_rows(), COLUMNS, args, CASES)
    show(path)


if __name__ == "__main__":
    main()
