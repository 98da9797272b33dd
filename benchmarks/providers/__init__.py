"""The implementations that are measured, one file each."""

from benchmarks.providers.compiled import COMPILE_MATMUL, COMPILE_SUM
from benchmarks.providers.dot_product import DOT_PRODUCT
from benchmarks.providers.fused import FUSED, PYTORCH_PATH
from benchmarks.providers.plain import PLAIN
from benchmarks.providers.runner import Provider, Runner

PROVIDERS = [PLAIN, COMPILE_MATMUL, COMPILE_SUM, FUSED, PYTORCH_PATH, DOT_PRODUCT]

__all__ = ["PROVIDERS", "Provider", "Runner"]
