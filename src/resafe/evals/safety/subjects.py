"""The models of an evaluation: local checkpoints, grouped by the base they share, and models behind endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resafe.checkpoints import Checkpoint, open_checkpoint
from resafe.errors import InputError

SERVED = ("openai-api/", "vllm/", "sglang/", "ollama/")
"""Beginnings of names that are Inspect's providers; any other of its providers is named `inspect:provider/model`."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        name: In tables.
        reference: As it was given.
        checkpoint: A local model or adapter, or None.
        served: Inspect's name of a model behind an endpoint; empty for a local one.
    """

    name: str
    reference: str
    checkpoint: Checkpoint | None = None
    served: str = ""

    @property
    def base(self) -> Checkpoint | None:
        """The plain model that has to be loaded; None behind an endpoint."""
        found = self.checkpoint
        return found.base if found is not None and found.kind == "adapter" else found


def subjects(given: Sequence[str | Path | Checkpoint | tuple[str, str | Path | Checkpoint]]) -> list[Subject]:
    """Models as given: references, `NAME=REFERENCE`, opened checkpoints, or (name, one of these).

    Raises:
        InputError: None, two of one name, or a reference to nothing.
    """
    found = [_subject(item) for item in given]
    names = [one.name for one in found]
    if not found or len(set(names)) < len(names):
        raise InputError(
            "no model was given" if not found else f"two models have one name: {', '.join(names)}",
            "name them: base=PATH tuned=PATH",
        )
    return found


def _subject(item: str | Path | Checkpoint | tuple[str, str | Path | Checkpoint]) -> Subject:
    if isinstance(item, tuple):
        return _opened(item[0], item[1])
    if isinstance(item, str) and not Path(item).exists():
        name, sign, reference = item.partition("=")
        if sign and "/" not in name:
            return _opened(name, reference)
    return _opened("", item)


def _opened(name: str, item: str | Path | Checkpoint) -> Subject:
    if isinstance(item, Checkpoint):
        return Subject(name or item.reference, item.reference, _with_base(item))
    text = str(item)
    if not Path(text).exists():
        if text.startswith("inspect:"):
            return Subject(name or text, text, served=text.removeprefix("inspect:"))
        if text.startswith(SERVED):
            return Subject(name or text, text, served=text)
    return Subject(name or text, text, _with_base(open_checkpoint(item)))


def _with_base(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.kind == "adapter" and checkpoint.base is None:
        raise InputError(
            f"{checkpoint.reference}: the adapter names no base", f"give it as BASE+{checkpoint.reference}"
        )
    return checkpoint


def by_base(given: Sequence[Subject]) -> list[list[Subject]]:
    """Local models in groups that share a base; each endpoint by itself. In the order in which they first occur."""
    groups: dict[str, list[Subject]] = {}
    for one in given:
        key = str(one.base.path) if one.base is not None else f"endpoint {one.name}"
        groups.setdefault(key, []).append(one)
    return list(groups.values())
