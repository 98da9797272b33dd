"""Encodes launch plans as numbers, by which the compiled library repeats calls without Python
(``csrc/bindings/plans.cpp`` reads them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from additive_attn.backends.triton.recorder import Buffer, Launch, Operation, Part

# As in torch's c10::ScalarType.
_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
_MOST_SHARED = 228 * 1024  # beyond that, a launch needs an attribute


def program(
    steps: Sequence[Launch | Operation], results: Sequence[Part], own: Sequence[Buffer], pool: int
) -> list[int] | None:
    """Returns a plan as numbers; None for what the library cannot do: operations of torch, results
    that are parts of a buffer, launches on other GPUs than CUDA's or with attributes."""
    launches = [x for x in steps if isinstance(x, Launch) and _is_simple(x)]
    whole = all(x.is_whole and x.dtype in _TYPES for x in results)
    if len(launches) < len(steps) or not whole or len(own) > len(results):
        return None
    numbers = [pool, len(results)]
    for x in results:
        numbers += (x.buffer.number, _TYPES[x.dtype], len(x.shape), *x.shape, *x.stride)
    numbers.append(len(launches))
    for launch in launches:
        metadata, signature = launch.found.kernel.metadata, launch.found.kernel.src.signature
        parameters = list(_parameters(tuple(signature.values()), launch.arguments))
        threads = metadata.num_warps * metadata.target.warp_size
        fixed = launch.found.function, launch.programs, threads, metadata.shared
        numbers += (*fixed, len(parameters))
        for parameter in parameters:
            if parameter is None:
                return None
            numbers += parameter
    return numbers


def _is_simple(launch: Launch) -> bool:
    metadata = launch.found.kernel.metadata
    absent = (
        "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size",
        "tensordesc_meta",
    )  # fmt: skip
    return (
        type(launch.found.run).__name__ == "CudaLauncher"
        and metadata.target.backend == "cuda"
        and metadata.num_ctas == 1
        and metadata.shared <= _MOST_SHARED
        and not metadata.instrumentation_mode
        and not any(getattr(metadata, name, None) for name in absent)
    )


def _parameters(types: tuple[Any, ...], values: Sequence[Any]) -> Iterator[tuple[int, int] | None]:
    """Yields what the kernel takes: the number of a tensor and bytes from its begin, or -1 and a
    value; None for what is neither an address nor an integer."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(kind, value)
        elif kind != "constexpr":
            if isinstance(value, Part):
                yield value.place
            elif value is None or type(value) is bool:
                yield -1, int(value or 0)
            elif type(value) is int and kind[0] in "iu":
                yield -1, value - 2**64 if value >= 2**63 else value
            else:
                yield None
