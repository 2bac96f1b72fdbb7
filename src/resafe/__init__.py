"""resafe: restores the safety of fine-tuned language models through model fusion, and proves it by measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resafe.errors import GateError, InputError, ResafeError

if TYPE_CHECKING:
    from resafe.api import apply_mask, average_masks, fuse, realign, train_mask
    from resafe.checkpoints import open_checkpoint as open
    from resafe.evaluation import evaluate
    from resafe.recipe.run import run_recipe
    from resafe.training.verbs import align, tune

__version__ = "0.1.0"
__all__ = [
    "GateError",
    "InputError",
    "ResafeError",
    "align",
    "apply_mask",
    "average_masks",
    "evaluate",
    "fuse",
    "open",
    "realign",
    "run_recipe",
    "train_mask",
    "tune",
]

_LAZY = {
    "align": ("resafe.training.verbs", "align"),
    "apply_mask": ("resafe.api", "apply_mask"),
    "average_masks": ("resafe.api", "average_masks"),
    "evaluate": ("resafe.evaluation", "evaluate"),
    "fuse": ("resafe.api", "fuse"),
    "open": ("resafe.checkpoints", "open_checkpoint"),
    "realign": ("resafe.api", "realign"),
    "run_recipe": ("resafe.recipe.run", "run_recipe"),
    "train_mask": ("resafe.api", "train_mask"),
    "tune": ("resafe.training.verbs", "tune"),
}


def __getattr__(name: str) -> Any:
    """Heavy names are imported on first use, so that `resafe --help` does not wait for torch."""
    if name in _LAZY:
        from importlib import import_module

        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'resafe' has no attribute '{name}'")
