"""Compiles and launches kernels: the target, the device, what is not specialised."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from additive_attn.backends.triton import compiled
from additive_attn.backends.triton.parameters import flat

# Sizes, offsets and numbers that differ from call to call: a kernel is compiled once for all.
_VARYING = (
    "inner", "entries", "entry_begin", "rows", "row_begin", "row_count", "keys", "key_begin",
    "key_count", "keys_per_split", "splits", "length", "length_padded",
    "row_tiles", "key_tiles", "row_programs", "key_programs", "value_programs", "groups",
    "left", "right", "threshold", "keep_bits", "scale_bits", "scale_exponent", "stored",
    *(
        f"{name}_{dim}"
        for name in ("query", "key", "value", "weight", "mask", "length", "seed", "query_exp",
                     "key_exp", "gw", "gl", "go", "gs", "x", "y")
        for dim in ("outer", "inner")
    ),
    "mask_row", "length_row", "gw_row", "gl_row", "gs_row", "x_channel",
    "y_channel", "y_output", "outputs", "channels", "terms", "shift", "width",
)  # fmt: skip


def kernel(function: Callable[..., Any]) -> Any:
    """Returns a kernel, which may take tuples (``parameters.flat``)."""
    function, varying = flat(function)
    return triton.jit(function, do_not_specialize=(*_VARYING, *varying))


# "tf32" where products of float32 may round to 10 bits. torch.get_float32_matmul_precision raises
# once torch.backends.cuda.matmul.fp32_precision has been set.
matmul_precision = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on any device."""
    return bool(triton.knobs.runtime.interpret)


def target() -> str:
    """Returns the target of the kernels' inline assembly: cuda, hip or none."""
    if interpreted():
        return "none"
    return "hip" if torch.version.hip is not None else "cuda"


def registers(most: int) -> dict[str, int]:
    """Returns the option that bounds the registers of a thread. Without a bound the compiler may
    spill some, to let more programs run at once."""
    return {"maxnreg": most} if target() == "cuda" else {}


def bits(x: float) -> int:
    """Returns a number as kernels take it (``numerics.number``)."""
    (integer,) = struct.unpack("<q", struct.pack("<d", x))
    return int(integer)


@functools.cache
def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU; a small number in the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch(function: Any, programs: int, tensor: Tensor, *arguments: Any, **options: Any) -> None:
    """Runs ``programs`` programs on the device, and the current stream, of ``tensor``."""
    if programs == 0:
        return
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            launch(function, programs, tensor, *arguments, **options)
        compiled.unknown()
        return
    options["enable_fp_fusion"] = True  # later versions of Triton do not fuse by default
    where = compiled.settings() if type(function) is JITFunction else None
    if where is None or function.pre_run_hooks:
        function[(programs,)](*arguments, **options)
        compiled.unknown()
    else:
        compiled.run(function, programs, arguments, options, where)
