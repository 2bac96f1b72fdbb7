"""Sums of adapters as an adapter: exact by putting their ranks side by side, or truncated with the error known.

Adding the factors A and B of several adapters apart gives cross terms; Σ c_k s_k B_k A_k is the product of
[c_1 s_1 B_1, c_2 s_2 B_2, …] and the stack of the A_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resafe.checkpoints import Checkpoint, save_adapter
from resafe.deltas.lora import factor_modules
from resafe.engine.plan import Plan
from resafe.engine.stage import entered, stage_of
from resafe.engine.target import Upload
from resafe.errors import InputError

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """A fused adapter, written.

    Attributes:
        out: Its directory, or its address in object storage.
        rank: Its rank; modules may have less.
        error: ‖what truncation left out‖ / ‖the exact sum‖, over all modules together; 0 for an exact sum.
    """

    out: Path | str
    rank: int
    error: float


def fuse_adapters(plan: Plan, rank: int | None = None) -> LowRank:
    """Writes the sum that a plan makes of adapters as one adapter.

    Args:
        plan: A plan whose models are all LoRA adapters and whose method is a weighted sum.
        rank: Rank of the result at most, by singular value decomposition of each module; None keeps the exact sum.

    Raises:
        InputError: The method is no weighted sum, a model is no plain LoRA adapter, or `rank` is below 1.
    """
    if not plan.method.traits["weighted_sum"]:
        raise InputError(
            f"{plan.fusion.name} of adapters has no low rank", "write a model, or use task_arithmetic or average"
        )
    if rank is not None and rank < 1:
        raise InputError(f"rank {rank}", "give a rank of at least 1, or none for the exact sum")
    adapters = [_plain(model.name, model.checkpoint) for model in plan.models]
    parts = [factor_modules(adapter) for adapter in adapters]
    modules = sorted({module for own in parts for module in own})
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    left, whole = 0.0, 0.0
    for module in modules:
        factors = _coefficients(plan, f"{module}.weight")
        up, down = [], []
        for adapter, own, factor in zip(adapters, parts, factors, strict=True):
            if module in own:
                a, b, scale = own[module]
                down.append(adapter.read(a).float())
                up.append(adapter.read(b).float() * (factor * scale))
        b_all, a_all = torch.cat(up, 1), torch.cat(down, 0)
        if rank is not None:
            b_all, a_all, dropped, total = truncated_product(b_all, a_all, rank)
            left, whole = left + dropped, whole + total
        ranks[module] = a_all.shape[0]
        kind = adapters[0].tensors[next(iter(adapters[0].tensors))].dtype
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a_all.to(kind).contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b_all.to(kind).contiguous()
    largest = max(ranks.values())
    smaller = {module: r for module, r in ranks.items() if r != largest}
    config = {
        "r": largest, "lora_alpha": largest, "use_rslora": False, "rank_pattern": smaller, "alpha_pattern": smaller,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}) if not smaller else modules,
    }  # fmt: skip
    error = (left / whole) ** 0.5 if whole > 0 else 0.0
    names = ", ".join(f"{model.name} ({model.checkpoint.reference})" for model in plan.models)
    cut = "" if rank is None else f", then truncated to rank {rank} (relative error {error:.3g})"
    card = (
        f"# {plan.request.name}\n\nFused by resafe: {plan.method.title} of the adapters {names}, by putting their "
        f"ranks side by side{cut}.\n"
    )
    if isinstance(plan.request.out, Path):
        save_adapter(plan.request.out, tensors, adapters[0], card, config=config)
    else:
        stage = stage_of(plan.request.out, plan.base.cache)
        with Upload(stage, plan.digest) as upload, entered(stage, plan.digest, 0, 1):
            upload.check()
            upload.upload(save_adapter(stage.path / "adapter", tensors, adapters[0], card, config=config))
            stage.remove()
    return LowRank(plan.request.out, largest, error)


def truncated_product(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best rank-`rank` factors of up @ down, without forming the product.

    Args:
        up: B, (out, r).
        down: A, (r, in).
        rank: Rank of the result at most.

    Returns:
        B', A' with the singular values shared evenly between them, and Σ σ² of what is left out and of all.
    """
    left, left_core = torch.linalg.qr(up.double())
    right, right_core = torch.linalg.qr(down.double().T)
    u, values, v = torch.linalg.svd(left_core @ right_core.T)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    squares = values**2
    b = (left @ u[:, :kept]) * root
    a = root[:, None] * (right @ v[:kept].T).T
    return b.float(), a.float(), float(squares[kept:].sum()), float(squares.sum())


def _coefficients(plan: Plan, name: str) -> list[float]:
    """c_k of the weighted sum, read off the method itself: its value at the unit vectors."""
    weights = [model.coefficients.at(name) for model in plan.models]
    count = len(weights)
    unit = torch.eye(count)
    return [float(plan.fusion.combine(name, list(unit[k].reshape(count, 1)), weights=weights)) for k in range(count)]


def _plain(label: str, checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.kind != "adapter":
        raise InputError(f"{label} is a full model", "only adapters fuse to an adapter; write a model instead")
    odd = [name for name in checkpoint.tensors if ".lora_A." not in name and ".lora_B." not in name]
    if odd or checkpoint.config.get("use_dora"):
        raise InputError(
            f"{label}: {odd[0] if odd else 'DoRA'} is not a plain LoRA factor", "write a model instead of an adapter"
        )
    return checkpoint
