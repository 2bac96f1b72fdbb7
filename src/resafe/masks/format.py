"""The mask file: `safety_mask.safetensors` and `safety_mask.json`. A mask is a portable patch on (aligned, tuned).

Binary masks take one bit an entry, soft masks one byte. What is written is what is applied: a soft mask is rounded to
1/255 when it is made, so a mask read back gives the same model, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resafe.errors import InputError
from resafe.masks.concrete import MaskSettings, logits_key, oriented, rescaled, scaled_mask
from resafe.provenance import described

WEIGHTS, DESCRIPTION = "safety_mask.safetensors", "safety_mask.json"
FORMAT = 1


@dataclass(frozen=True)
class Mask:
    """A mask over task vectors.

    Attributes:
        values: Key → mask in [0, 1], float32, already rounded to what the file can hold.
        settings: Granularity and rescaling (the rest says how it was trained).
        provenance: Digests of aligned and tuned, training settings, anything JSON-like.
        entries: Key → entries of the task vectors that its values stand for; empty where each stands for one, or where
            that is not known (in files of before).
    """

    values: dict[str, Tensor]
    settings: MaskSettings = field(default_factory=MaskSettings)
    provenance: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        values: dict[str, Tensor],
        settings: MaskSettings,
        provenance: dict[str, Any] | None = None,
        entries: Mapping[str, int] | None = None,
    ) -> Mask:
        """A mask from raw values in [0, 1]; soft values are rounded to multiples of 1/255.

        Raises:
            InputError: A value is not a number.
        """
        for key, value in values.items():
            if not bool(value.isfinite().all()):
                raise InputError(f"the mask of '{key}' holds NaN", "train it again with a lower learning rate")
        rounded = {
            key: torch.round(value.detach().float().cpu().clamp(0, 1) * 255) / 255 for key, value in values.items()
        }
        sizes = dict(entries or {})
        if all(sizes.get(key) == value.numel() for key, value in rounded.items()):
            sizes = {}
        return cls(rounded, settings, provenance or {}, sizes)

    def weight(self, name: str) -> Tensor:
        """What a tensor's task vector is multiplied with, broadcastable to it: the mask, divided by its mean if asked.

        A mask with "norm" is not scaled here: by how much depends on the task vector (see `norm_kept`).

        Raises:
            InputError: The mask does not cover the tensor.
        """
        key = logits_key(name, self.settings.granularity)
        if key not in self.values:
            raise InputError(
                f"the mask has no values for '{name}'", "it was learnt on other tensors; train one for these"
            )
        return oriented(name, rescaled(self.values[key], self.settings.rescale), self.settings)

    @property
    def keep_rate(self) -> float:
        """Mean of the mask over the entries of the task vectors, before rescaling."""
        return self._mean(lambda value: value)

    def keep_rate_at(self, strength: float) -> float:
        """`keep_rate` of the mask at a strength (see `scaled_mask`)."""
        return self._mean(lambda value: scaled_mask(value, strength))

    def _mean(self, of: Callable[[Tensor], Tensor]) -> float:
        total = sum(float(of(value).double().sum()) * self._weight(key) for key, value in self.values.items())
        return total / max(1, sum(self.entries.get(key, value.numel()) for key, value in self.values.items()))

    def _weight(self, key: str) -> float:
        """The entries that a value of a key stands for."""
        count = self.values[key].numel()
        return self.entries.get(key, count) / max(1, count)

    @property
    def binary(self) -> bool:
        """Whether every entry is 0 or 1."""
        return all(bool(((value == 0) | (value == 1)).all()) for value in self.values.values())

    def save(self, directory: Path) -> None:
        """Writes the two files into a directory, which is made if it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        binary = self.binary
        tensors = {key: _pack(value, binary) for key, value in self.values.items()}
        description = {
            "format": FORMAT,
            "bits": 1 if binary else 8,
            "settings": described(self.settings),
            "shapes": {key: list(value.shape) for key, value in sorted(self.values.items())},
            "keep_rate": self.keep_rate,
            "provenance": self.provenance,
        }
        if self.entries:
            description["entries"] = dict(sorted(self.entries.items()))
        save_file(tensors, directory / WEIGHTS)
        (directory / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Mask:
        """Reads a mask that `save` wrote.

        Raises:
            InputError: A file is missing or damaged, or of a later format.
        """
        with readable(directory):
            description = read_description(directory)
            tensors = load_file(directory / WEIGHTS)
            bits, shapes = description["bits"], description["shapes"]
            values = {key: unpacked(tensors[key], bits, shapes[key]) for key in shapes}
            entries = {key: int(count) for key, count in description.get("entries", {}).items()}
            return cls(values, MaskSettings(**description["settings"]), description["provenance"], entries)


def save_masks(masks: Sequence[Mask], directory: Path) -> None:
    """Writes one mask into a directory, or several into its subdirectories 0, 1, …, one a tuned model."""
    for number, mask in enumerate(masks):
        mask.save(directory if len(masks) == 1 else directory / str(number))


def mask_directories(directory: Path) -> list[Path]:
    """Where the masks of a directory are: itself, or its subdirectories 0, 1, … where `save_masks` wrote several."""
    found: list[Path] = []
    while not (directory / DESCRIPTION).exists() and (directory / str(len(found)) / DESCRIPTION).is_file():
        found.append(directory / str(len(found)))
    return found or [directory]


def load_masks(directory: Path) -> tuple[Mask, ...]:
    """Reads what `save_masks` wrote.

    Raises:
        InputError: A file is missing or damaged, or of a later format.
    """
    return tuple(Mask.load(place) for place in mask_directories(directory))


@contextmanager
def readable(directory: Path) -> Iterator[None]:
    """Turns what goes wrong while a mask is read into an `InputError` that names it."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{error.filename or directory / WEIGHTS}: no such file",
            f"a mask is a directory with {WEIGHTS} and {DESCRIPTION}",
        ) from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory}: damaged mask file ({error})", "train it again, or copy it again") from None


def read_description(directory: Path) -> dict[str, Any]:
    """The content of a mask's `safety_mask.json`.

    Raises:
        InputError: It is of a later format.
    """
    description: dict[str, Any] = json.loads((directory / DESCRIPTION).read_text())
    if description["format"] > FORMAT:
        raise InputError(f"{directory}: mask format {description['format']} is newer than this resafe", "update it")
    return description


def _pack(value: Tensor, binary: bool) -> Tensor:
    flat = value.flatten().cpu().numpy()
    return torch.from_numpy(np.packbits(flat > 0.5) if binary else np.rint(flat * 255).astype(np.uint8))


def unpacked(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The mask behind its stored bytes, float32 of `shape`.

    Raises:
        ValueError: The bytes do not hold so many entries.
    """
    count = math.prod(shape)
    if bits not in (1, 8) or packed.dtype != torch.uint8 or packed.numel() != (-(-count // 8) if bits == 1 else count):
        raise ValueError(f"{packed.numel()} stored bytes do not hold {count} entries of {bits} bits")
    stored = packed.flatten().numpy()  # unpackbits would fill what is missing with zeros, in silence
    flat = np.unpackbits(stored, count=count).astype(np.float32) if bits == 1 else stored / np.float32(255)
    return torch.from_numpy(flat).reshape(tuple(shape))
