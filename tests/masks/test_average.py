"""The mean of masks, by hand and by the command."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from resafe.cli.app import app
from resafe.errors import InputError
from resafe.masks import Mask, MaskSettings
from resafe.masks.average import average_directories, averaged
from resafe.masks.format import load_masks, save_masks

ROW = MaskSettings(granularity="row", temperature=0.3)


def mask(*values, settings=ROW, **facts):
    return Mask.of({"a.weight": torch.tensor([values])}, settings, {"aligned": "x", "tuned": ["t"], **facts})


def test_mean_by_hand():
    found = averaged([mask(0.0, 1.0), mask(1.0, 1.0), mask(0.2, 0.4, tuned=["t", "u"])])
    assert found.values["a.weight"].tolist()[0] == pytest.approx([102 / 255, 204 / 255])  # 0.4 and 0.8
    assert (found.provenance["aligned"], found.provenance["tuned"]) == ("x", ["t", "u"])
    assert found.settings.granularity == "row"
    weighted = averaged([mask(0.0, 1.0), mask(1.0, 0.0)], [1, 3])
    assert weighted.values["a.weight"].tolist()[0] == pytest.approx([191 / 255, 64 / 255])  # 0.75 and 0.25, rounded


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mask(0.5, 0.5, settings=MaskSettings()), "granularity is entry, that of mask 0 is row"),
        (mask(0.5, 0.5, settings=MaskSettings(granularity="row", rescale="mean")), "rescale is mean"),
        (mask(0.5), "shape of a.weight is"),
        (mask(0.5, 0.5, aligned="y"), "another aligned model"),
        (Mask.of({"b.weight": torch.ones(1, 2)}, ROW), "values for 'a.weight'"),
    ],
)
def test_what_does_not_fit(other, message):
    with pytest.raises(InputError, match=message):
        averaged([mask(0.0, 1.0), other])


def test_weights_and_numbers():
    with pytest.raises(InputError, match="1 mask to average"):
        averaged([mask(0.0, 1.0)])
    for weights in ([1.0], [0.0, 0.0], [-1.0, 2.0]):
        with pytest.raises(InputError, match="for 2 masks"):
            averaged([mask(0.0, 1.0), mask(0.0, 1.0)], weights)


def test_the_command(tmp_path):
    for name, masks in (("one", [mask(0.0, 1.0), mask(1.0, 1.0)]), ("two", [mask(1.0, 0.0), mask(1.0, 0.0)])):
        save_masks(masks, tmp_path / name)
    mask(0.0, 0.0).save(tmp_path / "single")
    asked = ["mask", "average", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "mean")]
    done = CliRunner().invoke(app, [*asked, "--weight", "3", "--weight", "1"])
    assert done.exit_code == 0 and done.output.strip() == str(tmp_path / "mean")
    found = load_masks(tmp_path / "mean")
    assert [m.values["a.weight"].mul(255).round().int().tolist()[0] for m in found] == [[64, 191], [255, 191]]
    assert str(tmp_path / "one") in found[0].provenance["averaged"][0]
    done = CliRunner().invoke(app, ["mask", "average", str(tmp_path / "one"), str(tmp_path / "single"), "--out", "x"])
    assert isinstance(done.exception, InputError) and "holds 1 masks" in str(done.exception)


def test_masks_of_their_own_are_paired_by_their_models(tmp_path):
    """Two models' masks, learnt on them in either order; the mean is in the first's."""
    one = [mask(0.0, 1.0, tuned=["t", "u"]), mask(1.0, 1.0, tuned=["t", "u"])]
    save_masks(one, tmp_path / "one")
    save_masks([mask(0.6, 0.6, tuned=["u", "t"]), mask(0.2, 0.2, tuned=["u", "t"])], tmp_path / "two")
    found = average_directories([tmp_path / "one", tmp_path / "two"])
    assert [m.values["a.weight"].mul(255).round().int().tolist()[0] for m in found] == [[26, 153], [204, 204]]
    assert [m.provenance["tuned"] for m in found] == [["t", "u"]] * 2
    save_masks([mask(0.6, 0.6, tuned=["u", "v"]), mask(0.2, 0.2, tuned=["u", "v"])], tmp_path / "strange")
    with pytest.raises(InputError, match="strange holds masks for other tuned models"):
        average_directories([tmp_path / "one", tmp_path / "strange"])


def test_the_mean_keeps_a_fusion_that_all_were_learnt_with():
    fusion = {"name": "task_arithmetic", "settings": {"weight": 0.3}, "seed": 1, "models": []}
    one, two, three = (
        mask(0.0, 1.0, fusion={**fusion, **change}) for change in ({}, {"seed": 2}, {"settings": {"weight": 1.0}})
    )
    assert averaged([one, two]).provenance["fusion"] == fusion
    assert "fusion" not in averaged([one, three]).provenance
    assert "fusion" not in averaged([one, mask(0.0, 1.0)]).provenance
