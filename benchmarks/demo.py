"""The fused layer against the plain one: same results, same gradients, less time and memory.

python -m benchmarks.demo          about a minute
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import additive_attn
from additive_attn import AdditiveAttention, PlainAdditiveAttention, additive_attention
from benchmarks import run, table
from benchmarks.arguments import parser_of
from benchmarks.cases import SPEED, square
from benchmarks.providers import PROVIDERS

CASES = [
    replace(SPEED[4], modes=("forward",)),
    square(512, modes=("full",)),
    square(1024, modes=("full",)),
]


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def difference(ours: Tensor, theirs: Tensor) -> str:
    return f"largest difference {(ours - theirs).abs().max().item():.1e}"


def gradients(layer: nn.Module, inputs: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """Gradients of the inputs and of the parameters, by name."""
    leaves = dict(zip(("query", "key", "value"), inputs, strict=True)) | dict(
        layer.named_parameters()
    )
    out, _ = layer(*inputs)
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    return dict(zip(leaves, found, strict=True))


def show_equivalence() -> None:
    heading("1. A drop-in replacement")
    plain = PlainAdditiveAttention(input_dim=20, hidden_dim=32)
    fused = AdditiveAttention(input_dim=20, hidden_dim=32)
    fused.load_state_dict(plain.state_dict())
    print("the parameters of the plain layer load:", ", ".join(plain.state_dict()))

    query, key, value = (torch.randn(n, 20, requires_grad=True) for n in (1, 10, 10))
    out, weights = fused(query, key, value)
    plain_out, plain_weights = plain(query, key, value)
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        print(f"{name:<8} {tuple(tensor.shape)}")
    print(f"{'out':<8} {tuple(out.shape)!s:<8}  {difference(out, plain_out)}")
    print(f"{'weights':<8} {tuple(weights.shape)!s:<8}  {difference(weights, plain_weights)}")

    heading("2. The same gradients")
    upstream = torch.randn_like(out)
    ours = gradients(fused, [query, key, value], upstream)
    theirs = gradients(plain, [query, key, value], upstream)
    for name, gradient in ours.items():
        print(f"{name:<20} {difference(gradient, theirs[name])}")


def show_gradcheck() -> None:
    heading("3. gradcheck against finite differences, fp64")
    query, key, value, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 8), (2, 5, 8), (2, 5, 4), (8,))
    )
    lengths = torch.tensor([5, 2])
    cases: dict[str, dict[str, Any]] = {
        "no options": {},
        "lengths": {"lengths": lengths},
        "causal": {"is_causal": True},
        "with weights": {"need_weights": True},
    }
    for name, options in cases.items():

        def call(*tensors: Tensor, options: dict[str, Any] = options) -> Any:
            return additive_attention(*tensors, **options)

        torch.autograd.gradcheck(call, (query, key, value, weight))
        print(f"{name:<14} first order passed")
    torch.autograd.gradgradcheck(additive_attention, (query, key, value, weight))
    print(f"{'no options':<14} second order passed")


def show_speed() -> None:
    heading("4. Time and memory on this machine")
    device = torch.device("cpu")
    # The demo also runs without a kernel, and says so.
    ours = "pytorch path" if run.require_kernel(device, "pytorch") else "fused"
    providers = [each for each in PROVIDERS if each.name in ("plain", "compile sum", ours)]
    print(f"{torch.get_num_threads()} CPU threads, fp32; full is forward and backward")
    print(f"{'(B, Lq, Lk, H, Dv)':<25} {'':<20} {'time':>9} {'speed-up':>9} {'memory':>10}")
    for case in CASES:
        modes = list(case.modes)
        rows = list(run.measure_case(case, torch.float32, device, modes, 0.5, 5, providers))
        plain = next(row["median_ms"] for name, _, row in rows if name == "plain")
        for name, mode, row in rows:
            what = f"{case!s:<25} {mode:<7} {name.removesuffix(' sum'):<12}"
            if "note" in row:
                print(what, row["note"])
                continue
            time, memory = table.duration(row["median_ms"]), table.size(row["peak_extra_bytes"])
            print(f"{what} {time:>9} {plain / row['median_ms']:>8.1f}x {memory:>10}")
    print("the results of every line were checked against fp64 before it was timed")


def main() -> None:
    parser_of("benchmarks.demo", __doc__).parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    heading("Configuration")
    additive_attn.show_config()
    show_equivalence()
    show_gradcheck()
    show_speed()
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
