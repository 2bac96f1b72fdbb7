"""The engine's files are, to the last bit, the method on whole float32 tensors, rounded once; however it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resafe.checkpoints import open_checkpoint
from resafe.engine import Input, Request, build_plan, execute, spans
from resafe.fusion import FUSION, Fusion

from .conftest import write

Weights = dict[str, torch.Tensor]

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIDES = st.one_of(st.integers(0, 9), st.just(37))
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("task_arithmetic", {}),
    ("ties", {"scope": "tensor", "keep": 0.4}),
    ("ties", {"scope": "model", "keep": 0.4}),
    ("dare", {"drop": 0.3}),
]


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[list[Weights], list[int]]:
    """A base and one to three models of the same shapes, each tensor of any float dtype; and their numbers of files."""
    shapes = draw(st.lists(st.lists(SIDES, max_size=3).map(tuple), min_size=1, max_size=6))
    count = draw(st.integers(2, 4))
    seed = draw(st.integers(0, 2**16))
    found = []
    for k in range(count):
        generator = torch.Generator().manual_seed(seed + k)
        found.append(
            {f"t{i}": torch.randn(shape, generator=generator).to(draw(DTYPES)) for i, shape in enumerate(shapes)}
        )
    return found, [draw(st.integers(1, len(shapes))) for _ in range(count)]


def reference(values: list[Weights], fusion: Fusion, coefficients: list[float]) -> Weights:
    """Whole tensors in memory. As in the engine, a method that may take weights for task vectors takes weights."""
    base, *models = values
    affine = FUSION.get(fusion.name).traits["affine"]

    def inputs(name: str) -> list[torch.Tensor]:
        origin = torch.zeros(()) if affine else base[name].float()
        return [model[name].float() - origin for model in models]

    statistics = fusion.statistics(base, inputs)
    found = {}
    for name, own in base.items():
        fused = fusion.combine(name, inputs(name), statistics, coefficients) if own.numel() else torch.zeros(own.shape)
        found[name] = (fused if affine else own.float() + fused).to(own.dtype)
    return found


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    made=checkpoints(),
    method=st.sampled_from(METHODS),
    size=st.one_of(st.none(), st.integers(4, 2000)),
    piece=st.sampled_from([3, 16, 100, spans.PIECE]),
    threads=st.integers(1, 2),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_files_hold_the_methods_bits(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[list[Weights], list[int]], method: tuple[str, dict[str, Any]],
    size: int | None, piece: int, threads: int, seed: int, data: st.DataObject,
) -> None:  # fmt: skip
    (values, shards), (name, options) = made, method
    root: Path = tmp_path_factory.mktemp("exact")
    for k, (model, count) in enumerate(zip(values, shards, strict=True)):
        write(root / f"m{k}", model, shards=count)
    labels = tuple(f"m{k}" for k in range(1, len(values)))
    coefficients = [data.draw(st.sampled_from([1.0, 0.5, 0.3, 1.7])) for _ in labels]
    models = tuple(Input(str(root / m), m, c) for m, c in zip(labels, coefficients, strict=True))
    request = Request(str(root / "m0"), models, root / "out", name, options, max_shard_size=size, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "PIECE", piece)
        patch.setattr(spans, "_TASK", 4 * piece)
        assert execute(build_plan(request), threads=threads).committed
    found = open_checkpoint(root / "out")
    wanted = reference(values, Fusion(name, options, seed, labels), coefficients)
    assert set(found.tensors) == set(wanted)
    for tensor, value in wanted.items():
        read = found.read(tensor)
        assert read.dtype == value.dtype and read.shape == value.shape
        assert torch.equal(read, value), tensor
