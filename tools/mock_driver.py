"""What the host does for a call on a GPU, without a GPU: Triton's own launcher against a libcuda
that records what is launched (``mock_libcuda.c``). Kernels compile for sm_90 and never run, so
tensors lie on the CPU, and results stay unwritten."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import functools
import hashlib
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend

import additive_attn
from additive_attn.backends import triton as operators
from additive_attn.backends.triton import arguments, launch, plans
from additive_attn.ops import dispatch

_PARAMETERS, _KEPT = 128, 1024  # as in mock_libcuda.c
_SIZES = {"1": 1, "8": 1, "16": 2, "32": 4, "64": 8}
# Operators for which torch runs no kernel.
_NO_KERNEL = {
    "empty",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "empty_like",
    "_unsafe_view",
}


# Which parameters of a loaded function are addresses. Triton keeps functions until exit.
_pointers: dict[int, tuple[bool, ...]] = {}


class _Function(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 128),
        ("count", ctypes.c_int),
        ("size", ctypes.c_int * _PARAMETERS),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.POINTER(_Function)),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("context", ctypes.c_long),
        ("parameters", ctypes.c_ulonglong * _PARAMETERS),
    ]


class Launched(NamedTuple):
    """What reached the driver. ``pointers`` says which of the parameters are addresses."""

    name: str
    kernel: int  # equal for equal binaries
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    context: int
    parameters: tuple[int, ...]
    pointers: tuple[bool, ...]


class MockDriver:
    """Stands in for Triton's driver, and for the device."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.utils = self
        self.device, self.stream = 0, 0
        self._utils = nvidia.CudaUtils()
        self._count = ctypes.c_ulonglong.in_dll(library, "launched")
        self.enter = library.cuCtxSetCurrent  # for the calling thread
        self.enter.argtypes = [ctypes.c_void_p]
        self._others = ctypes.c_ulonglong.in_dll(library, "others")
        self._launches = (_Launch * _KEPT).in_dll(library, "launches")
        self._types: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._utils, name)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def allocate_default_profile_scratch(self, *_: Any) -> None:
        return None

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self._types = list(_flat(source.signature.values()))
        return nvidia.CudaLauncher(source, metadata)

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        """Loads the kernel that the last launcher was made for, and stores the sizes of its
        parameters in the library."""
        loaded = tuple(self._utils.load_binary(*arguments))
        function = ctypes.cast(loaded[1], ctypes.POINTER(_Function)).contents
        function.count = len(self._types)
        for n, kind in enumerate(self._types):
            function.size[n] = 8 if kind[0] == "*" else _SIZES[kind.lstrip("iufpb")]
        _pointers[loaded[1]] = tuple(kind[0] == "*" for kind in self._types)
        return loaded

    @property
    def launched(self) -> int:
        """How many kernels of Triton were launched."""
        return self._count.value

    @property
    def others(self) -> int:
        """How many calls that load, allocate or set something, which a capture may not allow."""
        return self._others.value

    def since(self, number: int) -> list[Launched]:
        """The launches from that number on."""
        assert self.launched - number <= _KEPT, "more launches than are kept"
        return [self._described(self._launches[n % _KEPT]) for n in range(number, self.launched)]

    def _described(self, launch: _Launch) -> Launched:
        function = launch.function.contents
        return Launched(
            function.name.decode(), ctypes.addressof(function), tuple(launch.grid),
            launch.threads, launch.shared, launch.stream or 0, launch.context,
            tuple(launch.parameters[: function.count]),
            _pointers[ctypes.addressof(function)],
        )  # fmt: skip


def _first_stage(backend: CUDABackend, stages: dict[str, Any], options: Any, *_: Any) -> None:
    """Compiles no further than to Triton's own code: the other stages take most of the time, and
    their result is never run."""

    def binary(source: Any, metadata: dict[str, Any]) -> bytes:
        code = str(source)
        found = re.search(r"tt\.func public @(\w+)", code)
        assert found is not None
        scratch = dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0)
        align = dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1)
        metadata.update(name=found[1], shared=1024, tmem_size=0, **scratch, **align)
        return code.encode()

    capability = backend._parse_arch(options.arch)
    stages["ttir"] = lambda x, metadata: backend.make_ttir(x, metadata, options, capability)
    stages["cubin"] = binary


def _flat(types: Any) -> Iterator[str]:
    for kind in types:
        if isinstance(kind, tuple):
            yield from _flat(kind)
        elif kind != "constexpr":
            yield kind


class TorchKernels(TorchDispatchMode):
    """Counts the operations of torch that run a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        changes = any(x.alias_info and x.alias_info.is_write for x in func._schema.arguments)
        made = any(x.alias_info is None for x in func._schema.returns)
        some = not isinstance(result, torch.Tensor) or result.numel()
        # As torch does, after an addition in place to a part of a tensor.
        to_itself = name == "copy_" and args[0].data_ptr() == args[1].data_ptr()
        if (made or changes) and some and not to_itself and name not in _NO_KERNEL:
            self.names.append(name)
        return result


@functools.cache
def mock_library() -> ctypes.CDLL:
    """Loaded for the whole process: a library of this name is found before any other."""
    place = tempfile.mkdtemp(prefix="mock_libcuda")
    source, built = Path(__file__).with_name("mock_libcuda.c"), Path(place, "libcuda.so.1")
    include = Path(nvidia.__file__).with_name("include")
    options = "-O1", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", f"-I{include}"
    subprocess.run(["cc", *options, str(source), "-o", str(built)], check=True)
    triton.knobs.nvidia.libcuda_path = place
    library = ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)
    # Kernels that live until the process ends must be unloaded by the driver that loaded them.
    atexit.register(lambda: triton.runtime.driver.set_active(MockDriver(library)))
    return library


def _cache() -> str:
    """A folder of its own, since Triton cannot distinguish these kernels from real ones."""
    made_by = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    return str(Path(__file__).parents[1] / "build" / "mock_driver" / made_by)


@contextlib.contextmanager
def installed() -> Iterator[MockDriver]:
    """Kernels go to the mock driver, and the operators of tensors on the CPU to the kernels."""
    driver, before = MockDriver(mock_library()), triton.runtime.driver._active
    library = torch.library.Library("additive_attn", "IMPL")
    with contextlib.ExitStack() as stack:
        replace = functools.partial(_replace, stack)
        replace(CUDABackend, "add_stages", _first_stage)
        replace(triton.knobs.cache, "dir", _cache())
        replace(dispatch, "cpu_is_plain", False)
        replace(dispatch, "repeated_forward", operators.repeated)
        replace(dispatch, "repeated_backward", operators.again)
        for module in (launch, arguments):
            replace(module, "processors", lambda device: 132)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="[^$]*only once for all operators")
            for name, plain in dispatch.PLAIN.items():
                function = getattr(operators, name, plain)
                library.impl(name, function, "CPU", allow_override=True)
        triton.runtime.driver.set_active(driver)
        try:
            yield driver
        finally:
            triton.runtime.driver._active = before
            library._destroy()


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def least(function: Callable[[], Any]) -> float:
    """Microseconds of the fastest of many calls."""
    times = []
    for _ in range(2000):
        begin = time.perf_counter_ns()
        function()
        times.append(time.perf_counter_ns() - begin)
    return min(times) / 1000


def empty_launch(tensor: torch.Tensor) -> Callable[[], None]:
    """Launches the kernel of the only plan that has the most arguments, and does nothing else;
    ``tensor`` replaces each tensor."""
    (plan,) = (x for x in plans._plans.values() if isinstance(x, plans.Plan))
    found = [step.launch for step in plan.steps if step.launch is not None]
    run, _, function, metadata, arguments, places, tuples = max(found, key=lambda x: len(x[4]))
    arguments = list(arguments)
    for place, *_ in places:
        arguments[place] = tensor
    for place, several in tuples:
        arguments[place] = tuple(tensor if n >= 0 else x for n, x in several)
    return lambda: run(1, 1, 1, 0, function, metadata, None, None, None, *arguments)


def _figures(driver: MockDriver, B: int, Lq: int, Lk: int, H: int, Dv: int) -> str:
    """Of a small call that repeats: launches; microseconds on the host without and with a plan;
    those of a launch that does nothing else, with as many arguments as the largest; the ratio."""
    given = torch.zeros(B, Lq, H), torch.zeros(B, Lk, H), torch.zeros(B, Lk, Dv), torch.zeros(H)

    def attend() -> Any:
        return additive_attn.additive_attention(*given)

    plans.on_cpu = False
    attend()
    before = driver.launched
    attend()
    launches = driver.launched - before
    ordinary = least(attend)
    plans.on_cpu = True
    plans.forget()
    for _ in range(3):
        attend()
    planned = least(attend)
    empty = least(empty_launch(given[0]))
    return f"{launches} {ordinary:.1f} {planned:.1f} {empty:.1f} {planned / empty:.1f}"


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m tools.mock_driver", description=__doc__).parse_args()
    torch.set_num_threads(1)
    print("B Lq Lk H Dv launches ordinary planned empty ratio")
    for shape in ((1, 1, 10, 32, 20), (64, 1, 400, 512, 512), (1, 8, 10, 32, 20)):
        with installed() as driver:
            print(*shape, _figures(driver, *shape), flush=True)
