"""Files in which nothing is fused: the kernel copies them, byte for byte, and they stay files of their own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from resafe.checkpoints import open_checkpoint
from resafe.engine import Input, Request, build_plan, execute
from resafe.engine.compute import Computer
from resafe.engine.kernelcopy import copy_bytes
from resafe.engine.unit import run_unit
from resafe.errors import InputError

from .conftest import write
from .test_adapters import make


def three_files(root: Path) -> dict[str, torch.Tensor]:
    values = {f"part{k}.{leaf}": torch.randn(6, 4) for leaf in ("table", "scale") for k in range(3)}
    values["part0.table"], values["part2.table"] = torch.arange(24).reshape(6, 4), torch.arange(24).reshape(6, 4)
    values["part0.scale"], values["part2.scale"] = torch.arange(5), torch.arange(5)
    write(root / "base", values, shards=3)
    write(root / "tuned", {n: v + 1 if v.is_floating_point() else v for n, v in values.items()})
    return values


def test_a_file_without_fused_tensors_is_copied_and_not_computed(tmp_path, monkeypatch):
    values, computed = three_files(tmp_path), []
    output = Computer.output
    monkeypatch.setattr(
        Computer, "output", lambda self, piece, s: computed.append(piece.tensor.name) or output(self, piece, s)
    )
    ticks = []
    plan = build_plan(Request(str(tmp_path / "base"), (Input(str(tmp_path / "tuned")),), tmp_path / "out"))
    assert execute(plan, threads=1, progress=lambda what, done, total: ticks.append((done, total))).committed
    assert set(computed) == {"part1.table", "part1.scale"}
    found = open_checkpoint(tmp_path / "out")
    for name, value in values.items():
        assert torch.equal(found.read(name), value + 1 if value.is_floating_point() else value)
    for number in (1, 3):
        one, two = (tmp_path / d / f"model-0000{number}-of-00003.safetensors" for d in ("base", "out"))
        data = sum(v.nbytes for n, v in values.items() if n.startswith(f"part{number - 1}"))
        assert one.read_bytes()[-data:] == two.read_bytes()[-data:]
        assert not one.samefile(two) and os.stat(two).st_nlink == 1  # a link would carry later edits into the base
    assert ticks[-1][0] <= ticks[-1][1]


def test_a_file_whose_tensors_lie_elsewhere_is_computed(tmp_path):
    values = three_files(tmp_path)
    plan = build_plan(
        Request(str(tmp_path / "base"), (Input(str(tmp_path / "tuned")),), tmp_path / "out", max_shard_size="1GB")
    )
    assert execute(plan, threads=1).committed  # one file out of three
    assert torch.equal(open_checkpoint(tmp_path / "out").read("part2.table"), values["part2.table"])


def test_a_file_that_was_cut_off_since_is_named(tmp_path):
    three_files(tmp_path)
    plan = build_plan(Request(str(tmp_path / "base"), (Input(str(tmp_path / "tuned")),), tmp_path / "out"))
    cut = next(unit for unit in plan.units if not any(tensor.fused for tensor in unit.tensors))
    file = plan.base.tensors[cut.tensors[0].name].file
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match="ends inside its tensors"):
        run_unit(Computer(plan, {}), cut, tmp_path, 1)


def test_the_same_file_is_the_same_to_the_last_byte(lab, tmp_path):
    """An adapter that changes nothing in a shard: the shard that resafe wrote before comes out with the same bytes."""
    adapter = make(lab, tmp_path / "adapter", lora_alpha=8)
    first = Request(str(lab.root / "base"), (Input(str(adapter)),), tmp_path / "one", max_shard_size=20_000)
    execute(build_plan(first), threads=1)
    base = tmp_path / "one"
    second = Request(str(base), (Input(f"{base}+{adapter}"),), tmp_path / "two")
    plan = build_plan(second)
    execute(plan, threads=1)
    untouched = [unit.file for unit in plan.units if not any(tensor.fused for tensor in unit.tensors)]
    assert untouched
    for file in untouched:
        assert (tmp_path / "two" / file).read_bytes() == (base / file).read_bytes()


@pytest.mark.parametrize("supported", [True, False])
def test_any_range_goes_to_any_place(tmp_path, monkeypatch, supported):
    if not supported:

        def refused(*_):
            raise OSError(errno.EXDEV, "between file systems")

        monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    monkeypatch.setattr("resafe.engine.kernelcopy._AT_ONCE", 7)
    (tmp_path / "a").write_bytes(bytes(range(100)))
    (tmp_path / "b").write_bytes(b"." * 50)
    moved = []
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("r+b") as target:
        copy_bytes(source.fileno(), 30, target.fileno(), 10, 20, moved.append)
        with pytest.raises(OSError, match="ends too early"):
            copy_bytes(source.fileno(), 95, target.fileno(), 0, 10)
    assert moved == [7, 7, 6]
    assert (tmp_path / "b").read_bytes()[10:] == bytes(range(30, 50)) + b"." * 20
