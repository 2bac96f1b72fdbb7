"""How a mask's training runs, not what it computes: memory, optimiser, trackers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from resafe.checkpoints.attention import attention_as
from resafe.errors import InputError
from resafe.masks.modules import MaskedLinear
from resafe.masks.processes import blocks

OptimizerName = Literal["adamw", "adamw_8bit"]
"""AdamW with moments in float32 (8 bytes a logit), or in eight bits by torchao (2 bytes a logit)."""

StorageName = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class EngineSettings:
    """How training runs.

    Attributes:
        gradient_checkpointing: Keep only the layers' inputs for the backward pass, and compute the layers again in it.
        storage: Precision in which aligned weights and task vectors are held while the mask learns; its logits and
            the losses are float32 in any case.
        optimizer: AdamW, or AdamW with moments in eight bits.
        report_to: Trackers, by the names that transformers knows them under: tensorboard, wandb, trackio, mlflow, …
        share_prompts: Compute the prompt of a pair once for both answers, where the model is found able to.
    """

    gradient_checkpointing: bool = False
    storage: StorageName = "float32"
    optimizer: OptimizerName = "adamw"
    report_to: tuple[str, ...] = ()
    share_prompts: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The storage precision as torch calls it."""
        return torch.bfloat16 if self.storage == "bfloat16" else torch.float32


def make_optimizer(name: OptimizerName, parameters: Iterable[nn.Parameter], learning_rate: float) -> Any:
    """AdamW without weight decay on the logits.

    Raises:
        InputError: The optimiser needs a package that is not installed.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    try:
        eight = importlib.import_module("torchao.optim").AdamW8bit
    except ImportError:
        raise InputError(
            "optimizer 'adamw_8bit' needs the package torchao", "pip install torchao, or leave optimizer at adamw"
        ) from None
    return eight(parameters, lr=learning_rate, weight_decay=0.0)


def checkpoint_layers(model: nn.Module) -> None:
    """Has the layers of a transformer computed again in the backward pass, in place of keeping what is inside them.

    transformers' own switch works in training mode only, with dropout; here the model stays in evaluation mode.
    """
    for layer in blocks(model):
        object.__setattr__(layer, "forward", _again(layer.forward, model))
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            module.again = False  # its layer is computed again as a whole


def _again(forward: Callable[..., Any], model: Any) -> Callable[..., Any]:
    def computed(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)

        def as_before(*arguments: Any, **named: Any) -> Any:
            with attention_as(model, attention):  # what a caller set for the forward pass is over in the backward pass
                return forward(*arguments, **named)

        return checkpoint(as_before, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

    return computed
