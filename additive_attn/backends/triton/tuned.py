"""Block sizes that were faster on a GPU than those in ``tiles.py``: changes of what its functions
return, by their names. ``python -m tools.tune --take`` writes them. None has been measured yet."""

from typing import Any

TUNED: dict[str, Any] = {}
