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
from resafe.masks.fused import FusedName
from resafe.masks.logits import sharded
from resafe.masks.modules import MaskedModule
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
        logits: Precision of the logits. In bfloat16 their steps are rounded stochastically (torchao), as most steps are
            smaller than the distance of two such numbers.
        step_in_backward: Step every tensor's logits as soon as its gradient is whole, and free the gradient.
        fused: Form each masked weight in one compiled pass (see `resafe.masks.fused`): on CUDA, everywhere, nowhere.
    """

    gradient_checkpointing: bool = False
    storage: StorageName = "float32"
    optimizer: OptimizerName = "adamw"
    report_to: tuple[str, ...] = ()
    share_prompts: bool = False
    logits: StorageName = "float32"
    step_in_backward: bool = False
    fused: FusedName = "auto"

    @property
    def dtype(self) -> torch.dtype:
        """The storage precision as torch calls it."""
        return torch.bfloat16 if self.storage == "bfloat16" else torch.float32


MANY = 2**26
"""Logits from which on the optimiser goes over its tensors once (fused), not once an operation: all weights of a model.

Fewer keep the roundings that published figures were made with."""


def make_optimizer(
    name: OptimizerName, parameters: Iterable[nn.Parameter], learning_rate: float, logits: StorageName = "float32"
) -> Any:
    """AdamW without weight decay on the logits.

    Raises:
        InputError: The optimiser needs a package that is not installed.
    """
    parameters = list(parameters)
    if name == "adamw" and logits == "float32":
        many = sum(parameter.numel() for parameter in parameters) >= MANY and not any(map(sharded, parameters))
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=many or None)
    try:
        package = importlib.import_module("torchao.optim")
    except ImportError:
        what = f"optimizer {name!r}" if name != "adamw" else "logits in bfloat16"
        raise InputError(
            f"{what} needs the package torchao",
            "pip install 'resafe[lowbit]', or leave optimizer and logits as they are",
        ) from None
    kind = package.AdamW8bit if name == "adamw_8bit" else package._AdamW
    rounded = {"bf16_stochastic_round": True} if logits == "bfloat16" else {}
    return kind(parameters, lr=learning_rate, weight_decay=0.0, **rounded)


def step_alone(optimizer: Any, parameter: nn.Parameter) -> None:
    """One step of one parameter, after which its gradient is gone; the optimiser's state stays in one place."""
    groups = optimizer.param_groups
    group = next(group for group in groups if any(other is parameter for other in group["params"]))
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
    parameter.grad = None


def checkpoint_layers(model: nn.Module) -> None:
    """Has the layers of a transformer computed again in the backward pass, in place of keeping what is inside them.

    transformers' own switch works in training mode only, with dropout; here the model stays in evaluation mode.
    """
    for module in model.modules():
        if isinstance(module, MaskedModule):
            module.again = True  # outside the layers (embedding, head) draws are made again, too
    for layer in blocks(model):
        object.__setattr__(layer, "forward", _again(layer.forward, model))
        for module in layer.modules():
            if isinstance(module, MaskedModule):
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
