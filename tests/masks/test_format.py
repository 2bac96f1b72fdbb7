"""The mask file: exact round trips, size, damage."""

from __future__ import annotations

import json

import pytest
import torch

from resafe.errors import InputError
from resafe.masks import Mask, MaskSettings
from resafe.masks.checkpoint import load_state, save_state


def test_soft_masks_round_trip_bit_for_bit(tmp_path):
    raw = {"a": torch.rand(13, 7), "b": torch.linspace(0, 1, 256).reshape(2, 128)}
    mask = Mask.of(raw, MaskSettings(rescale="mean"), {"export": "soft"})
    assert float((mask.values["a"] - raw["a"]).abs().max()) <= 0.5 / 255 + 1e-7
    mask.save(tmp_path)
    read = Mask.load(tmp_path)
    assert all(torch.equal(read.values[key], mask.values[key]) for key in raw)
    assert (read.settings, read.provenance) == (mask.settings, {"export": "soft"})
    assert torch.equal(read.weight("a"), mask.values["a"] / mask.values["a"].mean())
    assert json.loads((tmp_path / "safety_mask.json").read_text())["bits"] == 8
    payload = (tmp_path / "safety_mask.safetensors").stat().st_size
    assert 0 <= payload - (13 * 7 + 256) < 300  # one byte an entry and a header


def test_binary_masks_take_a_bit_an_entry(tmp_path):
    values = (torch.rand(1001, 33) > 0.3).float()
    mask = Mask.of({"w": values}, MaskSettings())
    mask.save(tmp_path)
    assert torch.equal(Mask.load(tmp_path).values["w"], values)
    assert 0 <= (tmp_path / "safety_mask.safetensors").stat().st_size - (1001 * 33 + 7) // 8 < 200
    assert mask.keep_rate == pytest.approx(float(values.mean()))
    assert mask.binary


def test_weight_of_ranks_and_of_unknown_tensors():
    mask = Mask.of({"m.lora.weight": torch.tensor([1.0, 0.0])}, MaskSettings(granularity="rank"))
    assert mask.weight("m.lora_A.weight").tolist() == [[1], [0]]
    assert mask.weight("m.lora_B.weight").tolist() == [[1, 0]]
    with pytest.raises(InputError, match="no values for 'n.lora_A"):
        mask.weight("n.lora_A.weight")


def test_what_is_no_number_is_no_mask():
    with pytest.raises(InputError, match="the mask of 'w' holds NaN"):
        Mask.of({"v": torch.ones(2), "w": torch.tensor([1.0, torch.nan])}, MaskSettings())


def edit(**changes):
    def apply(directory):
        path = directory / "safety_mask.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def cut(directory):
    path = directory / "safety_mask.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "damaged"),
        (edit(shapes={"w": [1000]}), "damaged"),  # more entries than bits
        (edit(bits=8), "damaged"),
        (edit(bits=4), "damaged"),
        (edit(shapes={"x": [40]}), "damaged"),
        (edit(settings={"colour": 1}), "damaged"),
        (edit(format=2), "newer"),
        (lambda d: (d / "safety_mask.json").write_text("{"), "damaged"),
        (lambda d: (d / "safety_mask.json").write_text('{"format": 1}'), "damaged"),
        (lambda d: (d / "safety_mask.json").unlink(), "no such file"),
        (lambda d: (d / "safety_mask.safetensors").unlink(), "no such file|No such file"),
    ],
)
def test_damage_is_reported(tmp_path, damage, message):
    Mask.of({"w": torch.ones(40)}, MaskSettings()).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        Mask.load(tmp_path)


def test_missing_provenance_is_damage(tmp_path):
    Mask.of({"w": torch.ones(40)}, MaskSettings()).save(tmp_path)
    path = tmp_path / "safety_mask.json"
    description = json.loads(path.read_text())
    del description["provenance"]
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match="provenance"):
        Mask.load(tmp_path)


def test_state_belongs_to_its_identity(tmp_path):
    path = tmp_path / "deep" / "state.safetensors"
    save_state(path, {"a": torch.arange(3.0)}, "one")
    assert load_state(path, "one")["a"].tolist() == [0, 1, 2]
    assert load_state(path, "two") is None
    assert load_state(tmp_path / "none", "one") is None
    path.write_bytes(b"broken")
    assert load_state(path, "one") is None
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]
