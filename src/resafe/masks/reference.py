"""π_ref of the preference losses: its log-probabilities, computed once and kept under a digest of their own.

They depend on models, items and precision, not on how a mask is trained: another β or learning rate uses them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from resafe.masks.batches import Item
from resafe.masks.checkpoint import load_state, save_state
from resafe.masks.logits import MaskLogits
from resafe.masks.losses import PASS_COST, UNPADDED, answer_log_probabilities
from resafe.masks.modules import MaskedWeight
from resafe.masks.pairs import pair_log_probabilities
from resafe.masks.processes import ALONE, Processes
from resafe.provenance import digest_value, versions

Reference = Literal["tuned", "aligned", "random"]
"""π_ref of DPO: the tuned model (mask 1), the aligned one (mask 0), or the published one (φ = 0, redrawn each step)."""

_LIBRARIES = ("torch", "transformers")
_FORMAT = 3  # raised when the same models and items give other numbers


def precision_of(model: torch.nn.Module) -> list[list[str]]:
    """Name, device and dtype of every frozen tensor: what a model's numbers depend on beside its checkpoint."""
    frozen = ((name, value) for name, value in model.named_parameters() if not value.requires_grad)
    return [[name, value.device.type, str(value.dtype)] for name, value in frozen]


def reference_digest(
    model: torch.nn.Module, logits: MaskLogits, items: Sequence[Item], which: Reference, models: str, shared: bool
) -> str:
    """Digest of all that a fixed reference's log-probabilities depend on.

    Args:
        model: The model with masks installed; its precision and device count.
        logits: Its logits; they know the task vectors.
        items: Encoded items, in order.
        which: "tuned" or "aligned".
        models: What the caller knows of the models, e.g. the digests of checkpoints, and of how they are fused.
        shared: Whether a pair's prompt is computed once for both answers.
    """
    tokens = [(i.chosen.prompt, i.chosen.answer, i.rejected.prompt, i.rejected.answer) if i.rejected else None
              for i in items]  # fmt: skip
    return digest_value(
        [_FORMAT, models, logits.vectors_digest, which, tokens, precision_of(model), shared, *made_with(model)]
    )


def made_with(model: Any) -> list[Any]:
    """What the numbers of a pass depend on beside model, precision and tokens: libraries, and how sequences go in."""
    unpadded = ["unpadded"] if getattr(model, UNPADDED, False) else []
    return [{name: version for name, version in versions().items() if name in _LIBRARIES}, *unpadded]


def kept_reference(
    folder: Path | None, digest: Callable[[], str], compute: Callable[[], Tensor], processes: Processes = ALONE
) -> Tensor:
    """The table under its digest in `folder`, or computed now and put there; None keeps nothing."""
    return kept_tensors("reference", folder, digest, lambda: {"log_probabilities": compute()}, processes)[
        "log_probabilities"
    ]


def kept_tensors(
    name: str,
    folder: Path | None,
    digest: Callable[[], str],
    compute: Callable[[], dict[str, Tensor]],
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """What is kept under its digest in a file called by `name` in `folder`, or is computed now and put there."""
    processes.wait()
    identity = digest() if folder else ""
    path = folder / f"{name}-{identity[:24]}.safetensors" if folder else None
    stored = load_state(path, identity) if path else None
    if not processes.agree(stored is not None):
        stored = compute()
        if path and processes.main:
            save_state(path, stored, identity)
    assert stored is not None
    return stored


def reference_log_probabilities(
    model: Any,
    logits: MaskLogits,
    items: Sequence[Item],
    which: Reference,
    pad_id: int,
    batch_size: int,
    processes: Processes = ALONE,
    shared: bool = False,
) -> Tensor:
    """The log π_ref of (chosen, rejected) for every pair, shape (items, 2), zeros for items without rejected answer."""
    table = torch.zeros(len(items), 2)
    order = sorted((i for i in items if i.rejected), key=lambda item: len(item.chosen))
    cost = pass_cost(model)
    with torch.no_grad(), logits.reading("ones" if which == "tuned" else "zeros"):
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            table[[item.index for item in chunk]] = both_log_probabilities(
                model, chunk, pad_id, cost, processes, shared
            ).cpu()
    return table


def pass_cost(model: torch.nn.Module) -> float:
    """Cost of one more pass through a masked model, in tokens: forming the masks anew is most of it.

    On two cores a pass cost about 70 to 100 tokens with masks over factors, 90 to 180 with 71 million masked entries of
    a 135-million model, and 100 to 250 with all its parameters masked.
    """
    masked = sum(module.aligned.numel() for module in model.modules() if isinstance(module, MaskedWeight))
    return PASS_COST + 300 * masked / sum(p.numel() for p in model.parameters() if not p.requires_grad)


def both_log_probabilities(
    model: Any, items: Sequence[Item], pad_id: int, cost: float, processes: Processes = ALONE, shared: bool = False
) -> Tensor:
    """Log π of (chosen, rejected) for every pair, shape (items, 2); `shared` computes a pair's prompt once."""
    if shared:
        pairs = [(item.chosen, item.rejected) for item in items if item.rejected]
        return pair_log_probabilities(model, pairs, pad_id, cost, processes)
    both = [item.chosen for item in items] + [item.rejected for item in items if item.rejected]
    sums, _ = answer_log_probabilities(model, both, pad_id, cost, processes)
    return torch.stack([sums[: len(items)], sums[len(items) :]], dim=1)
