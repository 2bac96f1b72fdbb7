"""The published loop of SOMF (METHODS §1), written plainly with torch: what resafe's step is timed against.

Two models, the policy and a reference whose logits stay zero. Every forward draws every mask with torch's
RelaxedBernoulli and divides it by its mean. Every step passes chosen and rejected answers, padded to the longest,
through both; logits are made for every position, prompt tokens included. Loss: DPO, sigmoid; AdamW on the logits.
Only linear layers are masked here; the published full mode masks embeddings, norms and the head as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli
from torch.nn import functional

from resafe.deltas import TaskVector
from resafe.masks import Encoded


class PublishedMask(nn.Module):
    """θ_a + τ ⊙ m / mean(m), m drawn at every call."""

    def __init__(self, aligned: Tensor, delta: Tensor, trains: bool) -> None:
        super().__init__()
        self.register_buffer("aligned", aligned)
        self.register_buffer("delta", delta)
        self.logits = nn.Parameter(torch.zeros_like(delta, dtype=torch.float32), requires_grad=trains)

    def forward(self) -> Tensor:
        """The weight."""
        temperature = torch.tensor(0.5, device=self.logits.device)
        mask = RelaxedBernoulli(temperature, logits=self.logits, validate_args=False).rsample()
        return self.aligned + self.delta * (mask / mask.mean()).to(self.delta.dtype)


class _Lora(nn.Module):
    def __init__(self, base: nn.Linear, a: PublishedMask, b: PublishedMask, scale: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scale = base, a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        update = functional.linear(functional.linear(x, self.a().to(x.dtype)), self.b().to(x.dtype))
        return self.base(x) + self.scale * update


class _Linear(nn.Module):
    def __init__(self, base: nn.Linear, weight: PublishedMask) -> None:
        super().__init__()
        self.bias, self.weight = base.bias, weight

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(), self.bias)


def install_published(model: nn.Module, vector: TaskVector, *, trains: bool) -> list[nn.Parameter]:
    """Masks a model in place; returns the logits."""
    factors, device = vector.factor_modules(), next(model.parameters()).device
    kind = next(model.parameters()).dtype
    model.requires_grad_(False)
    head = model.get_output_embeddings()  # type: ignore[operator]

    def made(name: str) -> PublishedMask:
        return PublishedMask(vector.aligned(name).to(kind), vector.delta(name).to(kind), trains).to(device)

    for path, child in list(model.named_modules()):
        if not isinstance(child, nn.Linear) or child is head:
            continue
        parent, _, leaf = path.rpartition(".")
        if factors is not None and path in factors:
            a, b, scale = factors[path]
            setattr(model.get_submodule(parent), leaf, _Lora(child, made(a), made(b), scale))
        elif factors is None and f"{path}.weight" in vector.names:
            setattr(model.get_submodule(parent), leaf, _Linear(child, made(f"{path}.weight")))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _log_probabilities(model: Any, sequences: Sequence[Encoded], pad_id: int) -> Tensor:
    """Σ log p(answer | prompt), from logits of every position."""
    device = next(model.parameters()).device
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id)
    attention, answers = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence.prompt + sequence.answer)
        attention[row, : len(sequence)] = 1
        answers[row, len(sequence.prompt) : len(sequence)] = True
    ids, attention, answers = ids.to(device), attention.to(device), answers.to(device)
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].float()
    labels = ids[:, 1:, None]
    picked = logits.gather(2, labels)[..., 0] - torch.logsumexp(logits, -1)  # as TRL's selective_log_softmax
    return (picked * answers[:, 1:]).sum(1)


def published_step(
    policy: Any, reference: Any, chosen: Sequence[Encoded], rejected: Sequence[Encoded], pad_id: int, optimizer: Any
) -> float:
    """One step; returns the loss."""
    both = [*chosen, *rejected]
    with torch.no_grad():
        fixed = _log_probabilities(reference, both, pad_id)
    now = _log_probabilities(policy, both, pad_id)
    won, lost = (now - fixed).split(len(chosen))
    loss = -functional.logsigmoid(0.1 * (won - lost)).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
