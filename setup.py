"""Builds the CPU kernel where it can be built; everything else stands in pyproject.toml.

The kernel is compiled against the torch that is already installed, also under pip's build
isolation. Where torch or a compiler is missing, the package installs without the kernel and
runs on plain PyTorch.

ADDITIVE_ATTN_BUILD_EXT=0 skips the kernel, ADDITIVE_ATTN_BUILD_EXT=1 fails if it cannot be built.
"""

import glob
import os
import sys
import sysconfig

from setuptools import setup

SETTING = os.environ.get("ADDITIVE_ATTN_BUILD_EXT", "")
REQUIRED = SETTING == "1"

COMPILE_ARGS = [
    "-O3",
    # tanh and exp must not stop vectorisation for the sake of errno and trap flags that nobody
    # reads; NaN and Inf keep their meaning (no -ffast-math).
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
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
    if SETTING == "0" or not sources or (os.name == "nt" and not REQUIRED):
        return {}
    cpp_extension = import_cpp_extension()
    if cpp_extension is None:
        message = (
            "torch was not found, so the CPU kernel of additive_attn is not built. "
            "Install torch first, then reinstall with: pip install --no-build-isolation ."
        )
        if REQUIRED:
            raise SystemExit(message)
        print(f"warning: {message}", file=sys.stderr)
        return {}

    class BuildKernel(cpp_extension.BuildExtension.with_options(use_ninja=False)):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # no compiler, a broken one, headers it cannot read, ...
                if REQUIRED:
                    raise
                self.warn(f"the CPU kernel of additive_attn is not built: {error}")

    extension = cpp_extension.CppExtension(
        "additive_attn._C",
        sources,
        depends=[*sorted(glob.glob("csrc/**/*.h", recursive=True)), "csrc/targets/all.inc"],
        extra_compile_args=COMPILE_ARGS,
        py_limited_api=True,
        optional=not REQUIRED,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildKernel},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**kernel())
