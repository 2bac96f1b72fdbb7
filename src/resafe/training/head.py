"""Makes a model compute logits of answer tokens only. Knows the model's output layer, no loss and no trainer.

TRL's trainers ask the model for log-probabilities of the labelled positions (`fused_lm_head=True`). Where Triton is
missing, TRL 1.16 runs the output layer over *every* position, in tiles that the backward pass computes again. On a
CPU, with short answers and a large vocabulary, that costs a third of a step. Here the output layer sees only the
positions whose next token is an answer token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resafe.checkpoints.output import output_of

MAX_LOGITS = 1 << 28
"""Above this many logits (1 GiB in float32) TRL's tiled computation is used, which bounds memory."""


@dataclass
class AnswerOutput:
    """What TRL's losses read: per position (batch, length − 1), zero where there is no answer token.

    `entropy` is NaN: computing it costs a pass over the logits and nothing here uses it.
    """

    log_probs: Tensor
    is_top1: Tensor
    mean_logits: Tensor
    entropy: Tensor
    label_mask: Tensor
    loss: Tensor
    log_sum_sq_probs: Tensor | None = None
    aux_loss: Tensor | None = None


def _answer_forward(model: Any, labels: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AnswerOutput:
    """Runs the model's own forward with an output layer that gets the selected positions only."""
    mask = labels[:, 1:] != -100
    targets = labels[:, 1:][mask]

    with output_of(model, lambda hidden: hidden[:, :-1][mask]):
        logits = type(model).forward(model, *args, **kwargs).logits.squeeze(0).float()
    picked = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    with torch.no_grad():
        top1 = spread((logits.argmax(-1) == targets).float()).bool()
        mean_logits = spread(logits.mean(-1))
    log_probs = spread(picked)
    return AnswerOutput(
        log_probs=log_probs,
        is_top1=top1,
        mean_logits=mean_logits,
        entropy=torch.full_like(mean_logits, float("nan")),
        label_mask=mask,
        loss=-log_probs.sum() / mask.sum().clamp(min=1),
    )


def install(model: Any) -> None:
    """Gives a causal language model (not a PEFT wrapper) the answer-only path, on top of the forward it has now.

    Used on CPU for label masks within `MAX_LOGITS`; everything else goes to the forward that was there before.
    """
    before = model.forward
    vocabulary = int(model.get_output_embeddings().weight.shape[0])

    def forward(
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if fused_lm_head and labels is not None and shift_labels is None and labels.device.type == "cpu":
            routed = bool(kwargs.get("output_router_logits"))  # a mixture's auxiliary loss: TRL's path has it
            if not routed and int((labels != -100).sum()) * vocabulary <= MAX_LOGITS:
                return _answer_forward(model, labels, args, {**kwargs, "use_cache": False})
        given = {"labels": labels, "shift_labels": shift_labels}
        kwargs.update({name: value for name, value in given.items() if value is not None})
        if fused_lm_head:
            kwargs["fused_lm_head"] = True
        return before(*args, **kwargs)

    model.forward = forward


@contextmanager
def forward_restored(model: Any) -> Iterator[None]:
    """Puts the model's forward back afterwards: trainers leave theirs on the instance."""
    had = model.__dict__.get("forward")
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if had is not None:
            model.forward = had
