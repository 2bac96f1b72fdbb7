"""Masks as a user trains, looks at and applies them: the library's calls and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import resafe
from resafe.api import _examples
from resafe.checkpoints import open_checkpoint
from resafe.cli.app import app
from resafe.data.counted import CountingReader
from resafe.deltas import task_vector
from resafe.errors import InputError
from resafe.fusion import Fusion
from resafe.masks import Mask, MaskSettings
from resafe.masks.concrete import logits_key, logits_shape
from resafe.masks.format import save_masks
from resafe.masks.summary import KeepRate, keep_rates, mean_keep
from resafe.realign import Problem
from resafe.recipe import load_mask
from resafe.report.heatmap import heatmap
from tests.realign.test_methods import family
from tests.tiny import PAIRS, Source

SETTINGS = {"preset": "labels", "steps": 2, "batch_size": 4}


def reference(lab, name):
    return f"{lab.root / 'base'}+{lab.root / name}"


def run(*arguments):
    found = CliRunner().invoke(app, ["mask", *map(str, arguments)])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.output


@pytest.fixture(scope="module")
def trained(lab, tmp_path_factory):
    """A mask that the command line trained, with the recipe."""
    place = tmp_path_factory.mktemp("mask")
    keep = place / "task.jsonl"
    keep.write_text(json.dumps({"prompt": "w3 w30", "response": "w80 w1"}) + "\n")
    fields = {
        "aligned": reference(lab, "safe"),
        "tuned": [reference(lab, "tuned")],
        "settings": SETTINGS,
        "keep": str(keep),
    }
    (place / "mask.yaml").write_text(yaml.safe_dump(fields))
    run("train", place / "mask.yaml", "--out", place / "mask", "--quiet")
    return place


def test_what_is_trained_is_what_realign_gives(lab, trained, tmp_path):
    """The command line, the library's call and realignment in one step: the same mask and the same adapter."""
    fields = yaml.safe_load((trained / "mask.yaml").read_text())
    again = resafe.train_mask(**fields, out=tmp_path / "again")
    (source,) = json.loads((again / "data.json").read_text())["sources"]  # the task's examples; the pairs are shipped
    assert (source["source"], source["rows"], source["kept"]) == (fields["keep"], 1, 1)
    one, two = Mask.load(trained / "mask"), Mask.load(again)
    assert one.values.keys() == two.values.keys() and one.provenance["training"]["steps"] == 2
    assert all(torch.equal(one.values[key], two.values[key]) for key in one.values)
    assert one.provenance["tuned"] == [lab.open("tuned").digest]
    run(
        "apply",
        trained / "mask",
        "--aligned",
        fields["aligned"],
        "--tuned",
        fields["tuned"][0],
        "--out",
        tmp_path / "safe",
    )
    direct = resafe.realign(fields["aligned"], fields["tuned"], mask=again, out=tmp_path / "direct")
    at_once = resafe.realign(
        fields["aligned"], fields["tuned"], settings=SETTINGS, keep=[fields["keep"]], out=tmp_path / "at-once"
    )
    found, wanted = open_checkpoint(tmp_path / "safe"), open_checkpoint(direct)
    for name in wanted.tensors:
        assert torch.equal(found.read(name), wanted.read(name))
        assert torch.allclose(
            open_checkpoint(at_once).read(name), wanted.read(name), atol=1e-3
        )  # a mask file has 8 bits
        assert open_checkpoint(at_once).read(name).isfinite().all()
        tuned, safe = lab.open("tuned").read(name), lab.open("safe").read(name)
        torch.testing.assert_close(found.read(name), safe + one.weight(name) * (tuned - safe))
    assert not (tmp_path / "again.work").exists()


def test_a_mask_knows_its_models(lab, trained, tmp_path):
    mask, aligned, other = trained / "mask", reference(lab, "safe"), reference(lab, "tuned2")
    with pytest.raises(InputError, match="was not learnt on .*tuned2"):
        run("apply", mask, "--aligned", aligned, "--tuned", other, "--out", tmp_path / "no")
    run("transfer", mask, "--aligned", aligned, "--tuned", other, "--out", tmp_path / "yes")
    name = next(iter(Mask.load(mask).values))
    wanted = lab.open("safe").read(name) + Mask.load(mask).weight(name) * (
        lab.open("tuned2").read(name) - lab.open("safe").read(name)
    )
    torch.testing.assert_close(open_checkpoint(tmp_path / "yes").read(name), wanted)
    with pytest.raises(InputError, match="learnt on another aligned model"):
        run("transfer", mask, "--aligned", reference(lab, "fresh"), "--tuned", other, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_info(trained, tmp_path):
    found = json.loads(run("info", trained / "mask", "--json", "--picture", tmp_path / "mask.svg"))
    assert found["granularity"] == "entry" and not found["binary"]
    assert found["values"] == sum(value.numel() for value in Mask.load(trained / "mask").values.values())
    assert {row["layer"] for row in found["rates"]} == {0, 1}
    assert sum(r["keep"] * r["values"] for r in found["rates"]) / found["values"] == pytest.approx(found["keep_rate"])
    ElementTree.parse(tmp_path / "mask.svg")
    shown = run("info", trained / "mask")
    assert (
        all(part in shown for part in ("self_attn", "q_proj", "lora_A")) and f"{found['keep_rate']:.3f} kept" in shown
    )


def test_keep_rates_by_hand():
    mask = Mask.of(
        {
            "model.layers.10.mlp.up_proj.weight": torch.tensor([[0.0, 1.0], [1.0, 1.0]]),
            "model.layers.2.mlp.up_proj.weight": torch.tensor([0.0, 1.0]),
            "lm_head.weight": torch.ones(3),
        },
        MaskSettings(),
    )
    rates = keep_rates(mask)
    assert rates == [
        KeepRate(2, "mlp.up_proj", 0.5, 2, 2), KeepRate(10, "mlp.up_proj", 0.75, 4, 4),
        KeepRate(None, "lm_head", 1.0, 3, 3)
    ]  # fmt: skip
    assert mean_keep(rates) == pytest.approx(7 / 9) == pytest.approx(mask.keep_rate)


def test_a_heatmap_is_darkest_where_least_is_kept():
    svg = heatmap(["0", "1"], ["q<"], {("0", "q<"): 0.5, ("1", "q<"): 1.0}, "kept & removed")
    cells = [e for e in ElementTree.fromstring(svg).iter() if e.get("fill", "").startswith("rgb")]
    assert [cell.get("fill") for cell in cells] == ["rgb(158,42,43)", "rgb(247,248,250)"]
    assert cells[0][0].text == "0 q<: 0.500"


def test_the_recipe_in_the_repository_is_valid_and_mistakes_are_named(tmp_path):
    assert load_mask(Path("recipes/mask.yaml")).settings == {"steps": 56}
    (tmp_path / "m.yaml").write_text("aligned: a\ntuned: [b]\nkeeep: c\n")
    with pytest.raises(InputError, match="did you mean 'keep'"):
        load_mask(tmp_path / "m.yaml")
    with pytest.raises(InputError, match="no output directory"):
        run("train", "recipes/mask.yaml")
    with pytest.raises(InputError, match="keep names 3 sets for 2 tuned models"):
        resafe.train_mask("a", ["b", "c"], out=tmp_path / "x", keep=["d", "e", "f"])
    with pytest.raises(InputError, match="settings name a mask"):
        resafe.train_mask("a", ["b"], out=tmp_path / "x", settings={"mask": "somewhere"})


def test_every_tuned_model_can_have_task_examples_of_its_own(tmp_path):
    for name, rows in (("a", 1), ("b", 3)):
        lines = [json.dumps({"prompt": f"{name} w{n}", "response": "w80 w1"}) for n in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    examples, owners = _examples(names, 2, 2, CountingReader())
    assert [(item.prompt[0], owner) for item, owner in zip(examples, owners, strict=True)] == [
        ("a", 0), ("b", 1), ("b", 1)
    ]  # fmt: skip
    assert _examples(names[0], 2, 2, CountingReader())[1] == []  # of both: which one, nobody knows
    assert _examples(names[1], 1, 2, CountingReader())[1] == [0, 0]


def test_two_tuned_models_with_masks_of_their_own(lab, trained, tmp_path):
    """Trained by the command line, looked at, and applied."""
    fields = yaml.safe_load((trained / "mask.yaml").read_text())
    fields["tuned"] = [reference(lab, "tuned"), reference(lab, "tuned2")]
    fields["settings"] = {**SETTINGS, "per_task": True}
    (tmp_path / "mask.yaml").write_text(yaml.safe_dump(fields))
    run("train", tmp_path / "mask.yaml", "--out", tmp_path / "mask", "--quiet")
    found = json.loads(run("info", tmp_path / "mask", "--json", "--picture", tmp_path / "mask.svg"))["masks"]
    masks = [Mask.load(tmp_path / "mask" / str(number)) for number in range(2)]
    assert [one["keep_rate"] for one in found] == [mask.keep_rate for mask in masks]
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["mask-0.svg", "mask-1.svg"]
    assert "mask/1: share kept" in run("info", tmp_path / "mask").replace("\n", "")
    run("apply", tmp_path / "mask", "--aligned", fields["aligned"], "--tuned", fields["tuned"][0], "--tuned",
        fields["tuned"][1], "--out", tmp_path / "safe")  # fmt: skip
    name = next(iter(masks[0].values))
    safe = lab.open("safe").read(name)
    wanted = safe + sum(
        mask.weight(name) * (lab.open(tuned).read(name) - safe)
        for mask, tuned in zip(masks, ("tuned", "tuned2"), strict=True)
    )
    torch.testing.assert_close(open_checkpoint(tmp_path / "safe").read(name), wanted)


def applied(place, lab, out, *more, tuned=("tuned", "tuned2"), verb="apply"):
    given = [part for name in tuned for part in ("--tuned", reference(lab, name))]
    run(verb, place, "--aligned", reference(lab, "safe"), *given, "--out", out, *more)
    return open_checkpoint(out)


@pytest.fixture(scope="module")
def fused(lab, tmp_path_factory):
    """Masks that the library trained over two models that DARE fuses, by draws of a seed and the models' names."""
    place = tmp_path_factory.mktemp("fused")
    vectors = [task_vector(lab.open(name), lab.open("safe")) for name in ("tuned", "tuned2")]
    fusion = Fusion("dare", {"weight": 0.3, "drop": 0.5}, 7, ("one", "two"))
    of = Problem(vectors, fusion, pairs=PAIRS, source=Source(lab))
    families = {}
    for name, per_task in (("shared", False), ("own", True)):
        families[name] = family("somf", of, preset="labels", steps=1, batch_size=4, per_task=per_task)
        save_masks(families[name].masks, place / name)
    return place, of, families


@pytest.mark.parametrize("name", ["shared", "own"])
def test_a_mask_is_applied_with_the_fusion_it_was_learnt_with(lab, fused, tmp_path, name):
    place, of, families = fused
    found, wanted = applied(place / name, lab, tmp_path / "safe"), families[name].at(1.0)
    for tensor in of.names:
        torch.testing.assert_close(found.read(tensor), wanted(tensor))
    shown = json.loads(run("info", place / name, "--json"))
    facts = {"name": "dare", "settings": {"drop": 0.5, "weight": 0.3}, "seed": 7, "models": ["one", "two"]}
    assert (shown if name == "shared" else shown["masks"][1])["fusion"] == facts
    assert "learnt with the fusion dare" in run("info", place / name)


def test_realign_with_a_mask_fuses_as_it_was_learnt_and_keeps_the_order(lab, fused, tmp_path):
    place, of, families = fused
    models = [reference(lab, name) for name in ("tuned", "tuned2")]
    out = resafe.realign(reference(lab, "safe"), models, mask=place / "own", out=tmp_path / "out")
    found, wanted = open_checkpoint(out), families["own"].at(1.0)
    for tensor in of.names:
        torch.testing.assert_close(found.read(tensor), wanted(tensor))
    with pytest.raises(InputError, match="in another order"):
        resafe.realign(reference(lab, "safe"), models[::-1], mask=place / "own", out=tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": float("nan")}, "a strength of nan"),
        ({"strength": -3.0}, "a strength of -3"),
        ({"method": "interpolation", "strength": 5.0}, "a strength of 5"),
        ({"method": "interpolation", "settings": {"removed": [0.5, 2.0]}}, "a strength of 2"),
        ({"method": "random_mask", "strength": 1.5}, "a strength of 1.5"),
        ({"space": "factor"}, "there is no space 'factor'"),
        ({"fusion": "tis"}, "there is no fusion method 'tis'"),
        ({"fusion": "ties", "fusion_settings": {"kep": 0.3}}, "ties has no setting 'kep'"),
        ({"settings": {"steps": -3}}, "steps is -3"),
        ({"settings": {"batch_size": 0}}, "batch_size is 0"),
        ({"settings": {"learning_rate": -1.0}}, "learning_rate is -1"),
        ({"settings": {"shares": {"safety": -1.0}}}, "a share is no weight"),
        ({"settings": {"shares": {"safty": 1.0}}}, "there is no side 'safty'"),
        ({"settings": {"warm_share": 7.0}}, "warm_share is 7"),
        ({"settings": {"keep": 9.0, "export": "top_k"}}, "keep is 9"),
        ({"settings": {"answer_tokens": -2}}, "answer_tokens is -2"),
        ({"settings": {"answer_tokens": "some"}}, "setting 'answer_tokens' = 'some'"),
        ({"method": "selector", "settings": {"answer_tokens": 0}}, "answer_tokens is 0"),
        ({"settings": {"strengths": []}}, "no strength is given"),
        ({"settings": {"preset": "paper", "granularity": "layer"}}, "scaled back to what it was"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_told_before_anything_is_loaded(lab, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("resafe.realign.learn.masked_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(InputError) as caught:
        resafe.realign(reference(lab, "safe"), reference(lab, "tuned"), out=tmp_path / "out", **change)
    assert message in caught.value.message and caught.value.hint
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_ours_is_told_before_anything_is_loaded(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("resafe.realign.learn.masked_model", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="note.txt|not empty|did not write"):
        resafe.realign(reference(lab, "safe"), reference(lab, "tuned"), out=tmp_path)


def test_files_that_are_no_masks(trained, tmp_path):
    for path in (trained / "mask.yaml", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            Mask.load(path)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "safety_mask.json").write_bytes((trained / "mask" / "safety_mask.json").read_bytes())
    with pytest.raises(InputError, match=r"half/safety_mask.safetensors: no such file"):
        Mask.load(tmp_path / "half")
    for picture in (tmp_path / "no" / "p.svg", tmp_path / "p.png"):
        with pytest.raises(InputError, match="cannot be written"):
            run("info", trained / "mask", "--picture", picture)
        assert not picture.exists()


def test_another_fusion_is_honoured_and_said(lab, fused, tmp_path):
    place, of, families = fused
    with pytest.warns(UserWarning, match="fused by task_arithmetic .*; the mask was learnt with dare"):
        found = applied(place / "shared", lab, tmp_path / "other", "--fusion", "task_arithmetic")
    mask, name = families["shared"].mask, of.names[0]
    wanted = of.vectors[0].aligned(name) + sum(mask.weight(name) * vector.delta(name) for vector in of.vectors)
    torch.testing.assert_close(found.read(name), wanted)
    models = lab.open("safe"), [lab.open("tuned"), lab.open("tuned2")]
    with pytest.warns(UserWarning, match="'weight': 0.6"):
        out = resafe.apply_mask(place / "shared", *models, out=tmp_path / "two", fusion_settings={"weight": 0.6})
    moved = families["shared"].at(1.0)(name) - of.vectors[0].aligned(name)
    torch.testing.assert_close(open_checkpoint(out).read(name), of.vectors[0].aligned(name) + 2 * moved)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        applied(place / "shared", lab, tmp_path / "transfer", "--fusion", "average", verb="transfer")
        one = applied(place / "shared", lab, tmp_path / "one", tuned=["tuned"])  # alone, nothing is fused
    masked = of.vectors[0].aligned(name) + mask.weight(name) * of.vectors[0].delta(name)
    torch.testing.assert_close(one.read(name), masked)


def test_a_mask_of_before_is_fused_by_task_arithmetic(lab, fused, tmp_path):
    _, of, families = fused
    facts = {key: value for key, value in families["shared"].mask.provenance.items() if key != "fusion"}
    replace(families["shared"].mask, provenance=facts).save(tmp_path / "old")
    name = of.names[0]
    wanted = of.vectors[0].aligned(name) + sum(
        families["shared"].mask.weight(name) * vector.delta(name) for vector in of.vectors
    )
    for number, order in enumerate([("tuned", "tuned2"), ("tuned2", "tuned")]):  # a sum has no order
        found = applied(tmp_path / "old", lab, tmp_path / str(number), tuned=order)
        torch.testing.assert_close(found.read(name), wanted)


def test_masks_of_their_own_take_their_models_in_their_order(lab, fused, tmp_path):
    place, of, families = fused
    turned, right = ("tuned2", "tuned"), f"give them as {reference(lab, 'tuned')}, {reference(lab, 'tuned2')}"
    for name in ("own", "shared"):  # the latter: DARE draws for each model by its place
        with pytest.raises(InputError, match="in another order") as caught:
            applied(place / name, lab, tmp_path / "no", tuned=turned)
        assert right in str(caught.value)
    with pytest.raises(InputError, match="in another order"):
        applied(place / "own", lab, tmp_path / "no", tuned=("tuned", "tuned"))
    assert not (tmp_path / "no").exists()
    found = applied(place / "own", lab, tmp_path / "yes", tuned=turned, verb="transfer")  # on one's own account
    wanted = replace(of, vectors=of.vectors[::-1]).masked(*(mask.weight for mask in families["own"].masks))
    for name in of.names:
        torch.testing.assert_close(found.read(name), wanted(name))


@pytest.mark.parametrize("granularity", ["entry", "row", "column", "rank"])
def test_a_mask_over_an_adapter_of_another_rank(lab, tmp_path, granularity):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(lab.plain(), config).save_pretrained(tmp_path / "r8")
    vector, settings = task_vector(lab.open("fresh"), lab.open("base")), MaskSettings(granularity)
    shapes = {logits_key(name, granularity): logits_shape(name, vector.shape(name), settings) for name in vector.names}
    Mask.of({key: torch.ones(shape) for key, shape in shapes.items()}, settings).save(tmp_path / "mask")
    with pytest.raises(InputError, match=r"have shape \(.*4.*\), \(.*8.*\) is needed.*\n.*space: weights"):
        run("transfer", tmp_path / "mask", "--aligned", lab.root / "base", "--tuned", tmp_path / "r8", "--out",
            tmp_path / "no")  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_the_mask_of_one(trained, tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "resafe", "mask",
         "train", str(trained / "mask.yaml"), "--out", str(tmp_path / "mask"), "--quiet"],
        env={**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(tmp_path / "mask")]
    one, two = Mask.load(trained / "mask"), Mask.load(tmp_path / "mask")
    assert one.provenance["training"] == two.provenance["training"]
    for key, value in one.values.items():
        assert float((two.values[key] - value).abs().max()) <= 1.01 / 255  # a last bit may round the other way
    assert not (tmp_path / "mask.work").exists()
