"""`realign` from directories: what is written loads, and equals the formula."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from resafe.api import realign
from resafe.errors import InputError
from tests.tiny import PAIRS, logits


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESAFE_CACHE", str(tmp_path / "cache"))


def test_an_adapter(lab, tmp_path):
    out = realign(
        lab.root / "safe", [str(lab.root / "tuned")], out=tmp_path / "out", method="interpolation", strength=0.3
    )
    safe, tuned, found = (
        load_file(p / "adapter_model.safetensors") for p in (lab.root / "safe", lab.root / "tuned", out)
    )
    for name in safe:
        torch.testing.assert_close(found[name], safe[name] + 0.7 * (tuned[name] - safe[name]))
    assert logits(lab.adapted(out)).isfinite().all()
    assert "removed share 1 − α 0.3" in (out / "README.md").read_text()


def test_full_models_fused(lab, tmp_path):
    tuned = [lab.open("full"), lab.open("full_all")]
    out = realign(
        lab.open("base"), tuned, out=tmp_path / "out", method="interpolation", settings={"removed": [0.1, 0.5, 0.6]},
        fusion="average",
    )  # fmt: skip
    base, one, two = (lab.plain(name).state_dict() for name in ("base", "full", "full_all"))
    found = lab.plain(out).state_dict()
    for name in base:  # without a strength the middle of the grid is taken
        torch.testing.assert_close(found[name], base[name] + 0.5 * ((one[name] + two[name]) / 2 - base[name]))


def test_weights_space_writes_a_model(lab, tmp_path):
    out = realign(
        lab.root / "safe",
        [lab.root / "tuned"],
        out=tmp_path / "out",
        method="interpolation",
        strength=0.0,
        space="weights",
    )
    torch.testing.assert_close(logits(lab.plain(out)), logits(lab.adapted("tuned")), rtol=1e-4, atol=1e-5)


def test_a_method_that_learns(lab, tmp_path, monkeypatch):
    class Material:
        pairs = tuple(PAIRS)

    asked = []
    monkeypatch.setattr("resafe.api.load_material", lambda *args, **more: asked.append((args, more)) or Material)
    steps = []
    out = realign(
        lab.root / "safe", [lab.root / "tuned"], out=tmp_path / "out", method="somf", device="cpu", seed=3,
        settings={"steps": 2, "batch_size": 4}, progress=lambda step, total, _: steps.append((step, total)),
    )  # fmt: skip
    assert [pair[0] for pair in asked] == [(["embedded"], ["embedded"])]
    assert {name: asked[0][1][name] for name in ("data_dir", "seed")} == {"data_dir": None, "seed": 3}
    assert steps[-2:] == [(1, 2), (2, 2)]
    assert "mask strength 1." in (out / "README.md").read_text()
    assert not torch.allclose(logits(lab.adapted(out)), logits(lab.adapted("tuned")), atol=1e-3)


def test_what_is_wrong_is_said(lab, tmp_path):
    for arguments, message in (
        ({"tuned": []}, "no tuned checkpoint"),
        ({"method": "smof"}, "did you mean 'somf'"),
        ({"settings": {"step": 1}}, "did you mean 'steps'"),
    ):
        with pytest.raises(InputError, match=message):
            realign(**{"aligned": lab.root / "safe", "tuned": [lab.root / "tuned"], "out": tmp_path / "o", **arguments})


def test_importing_the_api_loads_no_model_library() -> None:
    """A fusion needs neither transformers nor PEFT, which take longer to import than a small fusion takes."""
    code = "import sys, resafe.api; print([name for name in ('transformers', 'peft', 'trl') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_realign_is_the_function_whatever_was_imported_before() -> None:
    """The package of that name becomes an attribute of `resafe` when it is imported: the second call met a module."""
    code = """
import resafe, resafe.realign.somf
try:
    resafe.realign("a", [], out="o")
except resafe.InputError as error:
    print(error.message)
"""
    for first in ("", "import resafe.api\n"):
        found = subprocess.run([sys.executable, "-c", first + code], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "no tuned checkpoint was given"
