"""Builds the CPU kernel; everything else stands in pyproject.toml.

The kernel is compiled against the torch that is already installed, also under pip's build
isolation. Where torch or a compiler is missing, the installation stops and says so: pip shows
nothing of a build that succeeds, so a package without its kernel would pass for one with it.

ADDITIVE_ATTN_BUILD_EXT=0 leaves the kernel out, on purpose. On Windows it is left out anyway,
because MSVC lacks the vector extensions that it needs; =1 tries there too.
"""

import glob
import os
import sys
import sysconfig

from setuptools import setup

SETTING = os.environ.get("ADDITIVE_ATTN_BUILD_EXT", "")
OR_WITHOUT = (
    "To install without the kernel, on plain PyTorch, set ADDITIVE_ATTN_BUILD_EXT=0 in the "
    "environment."
)
NO_TORCH = f"""
The CPU kernel of additive_attn is compiled against the installed torch, and there is none here.
Install torch first. For a machine without a GPU, a download of 0.2 GB:
    pip install torch --index-url https://download.pytorch.org/whl/cpu
with one, pip install torch, which brings CUDA along: several gigabytes. Then:
    pip install .
{OR_WITHOUT}
"""
NO_COMPILER = f"""
The CPU kernel of additive_attn does not compile: {{error}}
It needs a C++20 compiler, g++ or clang++ (Debian and Ubuntu: apt install g++).
{OR_WITHOUT}
"""

COMPILE_ARGS = [
    "-O3",
    "-g0",
    # tanh and exp must not stop vectorisation for the sake of errno and trap flags that nobody
    # reads; NaN and Inf keep their meaning (no -ffast-math).
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",  # Python's own flags ask for debug information, ten times the size of the code
    # Stable ABI of torch 2.10: one binary serves every later torch. No -std: torch adds its own.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def import_cpp_extension():
    """torch.utils.cpp_extension, or None. Under build isolation torch is not importable as such,
    but the interpreter still knows where the target environment keeps its packages."""
    try:
        from torch.utils import cpp_extension
    except ModuleNotFoundError:
        platlib = sysconfig.get_path("platlib")
        if not os.path.isdir(os.path.join(platlib, "torch")):
            return None
        sys.path.append(platlib)
        from torch.utils import cpp_extension
    return cpp_extension


def kernel():
    """The arguments of setup() that add the kernel; empty where it is not to be built."""
    if SETTING not in ("", "0", "1"):
        raise SystemExit(f"ADDITIVE_ATTN_BUILD_EXT is {SETTING!r}; it may be 0, 1 or unset.")
    sources = sorted(glob.glob("csrc/**/*.cpp", recursive=True))
    if SETTING == "0" or not sources or (os.name == "nt" and SETTING != "1"):
        return {}
    cpp_extension = import_cpp_extension()
    if cpp_extension is None:
        # A source archive needs no torch. Before a wheel, pip asks for dist_info, and downloads
        # what the package depends on only afterwards: this stops before the gigabytes.
        if {"dist_info", "bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
            raise SystemExit(NO_TORCH)
        return {}

    class BuildKernel(cpp_extension.BuildExtension.with_options(use_ninja=False)):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # no compiler, a broken one, headers it cannot read, ...
                raise SystemExit(NO_COMPILER.format(error=error)) from error

    # The library uses nothing of Python's ABI. A free-threaded Python has no limited API to name.
    limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
    extension = cpp_extension.CppExtension(
        "additive_attn._C",
        sources,
        depends=[*sorted(glob.glob("csrc/**/*.h", recursive=True)), "csrc/targets/all.inc"],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=[] if os.name == "nt" else ["-Wl,-S"],
        py_limited_api=limited,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildKernel},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {},
    }


setup(**kernel())
