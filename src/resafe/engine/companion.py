"""What a method reads beside the task vectors, seen from a plan: whether it fits, and where it is applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from resafe.checkpoints import Checkpoint, TensorInfo, known_digest
from resafe.engine.sources import AdapterSource, Source
from resafe.fusion import Fusion, Inputs


def check_companion(
    fusion: Fusion, base: Checkpoint, models: Sequence[tuple[str, Checkpoint]], wanted: Mapping[str, TensorInfo]
) -> tuple[list[str], list[str]]:
    """Problems and notes of a method's companion; none for a method without one.

    Args:
        fusion: The method with its settings.
        base: The base; where its digest is known without reading it, it is compared with the companion's.
        models: Names and checkpoints.
        wanted: The tensors that are written.

    Raises:
        InputError: The companion cannot be opened.
    """
    companion = fusion.companion
    if companion is None:
        return [], []
    stored = [{n: i.shape for n, i in c.tensors.items()} if c.kind == "adapter" else None for _, c in models]
    shapes = {name: info.shape for name, info in wanted.items() if info.dtype.is_floating_point}
    inputs = Inputs(shapes, [name for name, _ in models], stored)
    problems = companion.problems(inputs)
    if companion.base is not None and known_digest(base) not in (None, companion.base):
        problems.append(f"made for another base than {base.reference} (its digest is {companion.base[:12]}…)")
    return [f"{fusion.name}: {problem}" for problem in problems], companion.notes(inputs)


def read_through(fusion: Fusion, number: int, source: Source) -> Source:
    """The source of a model, whose factors pass through the companion where they are an adapter's."""
    if fusion.companion is None or not isinstance(source, AdapterSource):
        return source
    return replace(source, change=partial(fusion.companion.reads, number))
