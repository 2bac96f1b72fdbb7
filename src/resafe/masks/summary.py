"""What a mask keeps, by layer and module. Knows names and values; knows no model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from resafe.masks.format import Mask

_LAYER = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\bexperts\.\d+\.")


@dataclass(frozen=True)
class KeepRate:
    """What is kept of one module of one layer.

    Attributes:
        layer: The first number in the names; None for tensors outside the numbered layers.
        module: The rest of the name after it, without "weight" and the number of an expert, e.g. "mlp.up_proj" or
            "self_attn.q_proj.lora_B".
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
    """One entry a module of a layer, by layer and then by module; tensors outside the layers come last.

    The experts of a layer, of which there may be hundreds, count as one module.
    """
    parts: dict[tuple[int | None, str], list[KeepRate]] = {}
    for key, value in mask.values.items():
        place, count = _place(key), value.numel()
        kept = float(value.double().mean()) if count else 1.0
        parts.setdefault(place, []).append(KeepRate(*place, kept, count, mask.entries.get(key, count)))
    found = [own[0] if len(own) == 1 else _together(own) for own in parts.values()]
    return sorted(found, key=lambda rate: (rate.layer is None, rate.layer or 0, rate.module))


def _together(rates: list[KeepRate]) -> KeepRate:
    values, entries = (sum(getattr(rate, what) for rate in rates) for what in ("values", "entries"))
    return replace(rates[0], keep=mean_keep(rates), values=values, entries=entries)


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
    if numbered is None:
        return None, name
    return int(numbered[1]), _EXPERT.sub("experts.", name[numbered.end() :])
