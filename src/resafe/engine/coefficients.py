"""One number a tensor for each model: a constant, a gradient over the layers, or numbers by name pattern.

Knows names of tensors, no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from resafe.errors import InputError

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
DEFAULT = "default"


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of one model.

    Attributes:
        rules: Pattern → value, tried in order; a pattern is a regular expression that is searched for in the tensor's
            name. A value is a number, or the numbers between which layers are interpolated, first layer to last.
        layers: Number of layers that the tensors' names count.
    """

    rules: tuple[tuple[str, tuple[float, ...]], ...]
    layers: int = 1

    @classmethod
    def of(cls, value: Any, names: Sequence[str], where: str) -> Coefficients:
        """Reads a coefficient as a user writes it.

        Args:
            value: A number; a list of numbers (a gradient over the layers); a mapping of patterns to either, where
                "default" stands for all other tensors; or the path of a YAML or JSON file that holds one of these.
            names: All tensor names; they say how many layers there are.
            where: Names the place in messages.

        Raises:
            InputError: Something else, an unreadable file, a pattern that is no regular expression or fits no tensor.
        """
        if isinstance(value, (str, Path)):
            return cls.of(_read(Path(value), where), names, f"{where} ({value})")
        rules = list(value.items()) if isinstance(value, Mapping) else [(DEFAULT, value)]
        found = []
        for pattern, item in sorted(rules, key=lambda rule: rule[0] == DEFAULT):
            numbers = tuple(item) if isinstance(item, (list, tuple)) else (item,)
            if not numbers or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
                raise InputError(f"{where}: {item!r} is no number and no list of numbers", "for example 0.5 or [0, 1]")
            if pattern != DEFAULT:
                _check_pattern(str(pattern), names, where)
            found.append(("" if pattern == DEFAULT else str(pattern), tuple(float(n) for n in numbers)))
        layers = 1 + max((layer for layer in map(layer_of, names) if layer is not None), default=0)
        return cls(tuple(found), layers)

    def at(self, name: str) -> float:
        """The coefficient of one tensor; 1 where no rule fits. Outside the layers a gradient has its ends.

        Names without a layer number that stand before the layers (embeddings) take the gradient's first number, the
        others (the final norm, the head) its last.
        """
        for pattern, numbers in self.rules:
            if re.search(pattern, name):
                return self._along(numbers, name)
        return 1.0

    def _along(self, numbers: tuple[float, ...], name: str) -> float:
        if len(numbers) == 1:
            return numbers[0]
        layer = layer_of(name)
        if layer is None:
            return numbers[0] if "embed" in name or "wte" in name else numbers[-1]
        place = layer / max(1, self.layers - 1) * (len(numbers) - 1)
        left = min(int(place), len(numbers) - 2)
        return numbers[left] + (place - left) * (numbers[left + 1] - numbers[left])


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor's name gives, counted from 0."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _read(path: Path, where: str) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{where}: {path} cannot be read ({error})", "give a YAML or JSON file") from error


def _check_pattern(pattern: str, names: Sequence[str], where: str) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"{where}: '{pattern}' is no regular expression ({error})", "escape its special signs"
        ) from None
    if not any(compiled.search(name) for name in names):
        raise InputError(f"{where}: no tensor's name fits '{pattern}'", f"a name is, for example, {names[0]}")
