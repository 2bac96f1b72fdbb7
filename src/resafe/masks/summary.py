"""What a mask keeps, by layer and module. Knows names and values; knows no model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from resafe.masks.format import Mask

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class KeepRate:
    """What is kept of one module of one layer.

    Attributes:
        layer: The first number in the names; None for tensors outside the numbered layers.
        module: The rest of the name after it, without "weight", e.g. "mlp.up_proj" or "self_attn.q_proj.lora_B".
        keep: Mean of the mask, before rescaling.
        values: How many values of the mask that is.
        entries: How many entries of the task vectors they stand for.
    """

    layer: int | None
    module: str
    keep: float
    values: int
    entries: int


def keep_rates(mask: Mask) -> list[KeepRate]:
    """One entry a key of the mask, by layer and then by module; tensors outside the layers come last."""
    found = [
        KeepRate(
            *_place(key),
            float(value.double().mean()) if value.numel() else 1.0,
            value.numel(),
            mask.entries.get(key, value.numel()),
        )
        for key, value in mask.values.items()
    ]
    return sorted(found, key=lambda rate: (rate.layer is None, rate.layer or 0, rate.module))


def mean_keep(rates: Iterable[KeepRate]) -> float:
    """Mean over all their entries."""
    chosen = list(rates)
    return sum(rate.keep * rate.entries for rate in chosen) / max(1, sum(rate.entries for rate in chosen))


def module_of(key: str) -> str:
    """The module that a key of a mask belongs to, whatever its layer, e.g. "mlp.up_proj"; tasks apart."""
    task, colon, name = key.rpartition(":")
    return task + colon + _place(name)[1]


def layer_of(key: str) -> tuple[str, int | None]:
    """The task ("" where all share a mask) and the layer that a key of a mask belongs to."""
    task, _, name = key.rpartition(":")
    numbered = _LAYER.search(name + ".")  # of a whole layer the number is the key's end
    return task, None if numbered is None else int(numbered[1])


def _place(key: str) -> tuple[int | None, str]:
    name = key.removesuffix(".weight")
    numbered = _LAYER.search(name)
    return (None, name) if numbered is None else (int(numbered[1]), name[numbered.end() :])
