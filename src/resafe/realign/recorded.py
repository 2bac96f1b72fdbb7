"""What a mask's file says of the models it was learnt on and of how these were fused. Knows no weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from resafe.errors import InputError
from resafe.fusion import Fusion
from resafe.masks import Mask
from resafe.provenance import described


def fusion_facts(fusion: Fusion) -> dict[str, Any]:
    """All that a fusion depends on beside its task vectors, for a mask's file; `recorded_fusion` reads it."""
    settings, models = described(fusion.resolved()), list(fusion.models)
    return {"fusion": {"name": fusion.name, "settings": settings, "seed": fusion.seed, "models": models}}


def recorded_fusion(
    provenance: Mapping[str, Any],
    models: int,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    *,
    warn: bool = True,
) -> Fusion:
    """The fusion that a mask was learnt with, with whatever is given in place of what its file says.

    Masks from before files said it, and one of several models for a single one, get task arithmetic by default.

    Args:
        provenance: Of the mask.
        models: How many are fused.
        name: Another method, which then has its own defaults.
        settings: Settings that replace single ones of the file's.
        seed: Another seed.
        warn: Whether to warn of a fusion that is not the mask's.
    """
    found = provenance.get("fusion")
    if found is None or (models == 1 and len(provenance.get("tuned") or [None]) > 1):
        return Fusion(name or "task_arithmetic", dict(settings or {}), seed or 0)
    kept = found["settings"] if name in (None, found["name"]) else {}
    called = tuple(found["models"]) if len(found["models"]) == models else ()
    fusion = Fusion(
        name or found["name"], {**kept, **(settings or {})}, found["seed"] if seed is None else seed, called
    )
    used = fusion_facts(fusion)["fusion"]
    if warn and any(used[part] != found[part] for part in ("name", "settings", "seed")):
        told = [f"{one['name']} {one['settings']}, seed {one['seed']}" for one in (used, found)]
        warnings.warn(f"the models are fused by {told[0]}; the mask was learnt with {told[1]}", stacklevel=3)
    return fusion


def check_order(masks: Sequence[Mask], digests: Sequence[str], references: Sequence[str]) -> None:
    """Checks that models come in the order in which masks were learnt on them.

    Masks of their own are paired with them by place, and a fusion may give each its own weight or draw. A shared mask
    that does not say how models were fused takes them in any order.

    Args:
        masks: One that all models share, or one a model.
        digests: Of the models.
        references: What to call them.

    Raises:
        InputError: The order is another one; the hint gives the right one.
    """
    learnt = list(masks[0].provenance.get("tuned") or [])
    ordered = len(masks) > 1 or ("fusion" in masks[0].provenance and sorted(digests) == sorted(learnt))
    if ordered and len(learnt) == len(digests) and list(digests) != learnt:
        called = dict(zip(digests, references, strict=True))
        raise InputError(
            f"the mask was learnt on these models in another order than {', '.join(references)}",
            f"give them as {', '.join(called.get(digest, f'(the model {digest[:12]})') for digest in learnt)}",
        )
