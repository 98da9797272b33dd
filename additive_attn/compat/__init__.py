"""The attention of other code bases on this package's kernels: same constructors, parameter names,
signatures and results. Each code base has a module; :func:`replace_attention` swaps the layers of
a model.

Where no key is left to attend to, these layers give 0; the originals give NaN, uniform weights or
a mean.
"""

from additive_attn.compat.replace import Swap, replace_attention

__all__ = ["Swap", "replace_attention"]
