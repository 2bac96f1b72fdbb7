"""Ways to restore safety, one file each; SOMF is the default.

The package can be called: importing it makes it the attribute `realign` of `resafe`, in place of the library's function
of that name, and `resafe.realign(…)` is to work whatever was imported before.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from resafe.realign import dare, further, interpolation, random_mask, selector, somf
from resafe.realign.base import REALIGN, Family, ModelSource, Problem, Realigned, realign_method
from resafe.realign.write import write_realigned

if TYPE_CHECKING:
    from pathlib import Path


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **settings: Any) -> Path:
        """`resafe.api.realign`."""
        from resafe.api import realign

        return realign(*arguments, **settings)


sys.modules[__name__].__class__ = _Callable

__all__ = [
    "REALIGN",
    "Family",
    "ModelSource",
    "Problem",
    "Realigned",
    "dare",
    "further",
    "interpolation",
    "random_mask",
    "realign_method",
    "selector",
    "somf",
    "write_realigned",
]
