"""A whole recipe on a tiny model: its outputs, what a change redoes, determinism, and what a kill leaves behind."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from resafe.errors import InputError
from resafe.recipe import check_recipe, load_recipe, run_recipe
from resafe.recipe.stage import Run, Stage
from resafe.report import read_records, read_results, to_json
from tests.conftest import Recorder, TinyRun

MODELS = ["aligned", "tuned-first", "tuned-second", "mask", "random", "half", "fused"]
STAGES = ["align", "tune-first", "tune-second", *(f"realign-{name}" for name in MODELS[3:])]
STAGES += [f"evaluate-{name}" for name in MODELS]
COMMAND = [sys.executable, "-c", "from resafe.cli import main; main()"]


def changed(tiny: TinyRun, **changes: Any) -> dict[str, Any]:
    raw = copy.deepcopy(tiny.raw)
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        place = raw
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    return raw


def figures(root: Path) -> dict[str, Any]:
    """The results without what depends on the machine's mood."""
    document: dict[str, Any] = json.loads((root / "results.json").read_text())
    return {key: value for key, value in document.items() if key not in ("seconds", "peak_memory_gb")}


def directory(root: Path, stage: str) -> Path:
    (found,) = (
        path for path in (root / "stages").iterdir() if re.fullmatch(re.escape(stage) + "-[0-9a-f]{12}", path.name)
    )
    return found


def receipts(root: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("stages/*/receipt.json")}


# What a run leaves


def test_every_stage_is_done_and_counted(tiny: TinyRun) -> None:
    assert tiny.outcome.redone == len(STAGES) == 14
    done = [json.loads((directory(tiny.root, stage) / "receipt.json").read_text()) for stage in STAGES]
    results = read_results(tiny.root / "results.json")
    assert results.seconds == pytest.approx(sum(receipt["seconds"] for receipt in done))
    assert results.peak_memory_gb == max(receipt["peak_memory_gb"] for receipt in done)
    assert [line for line in tiny.reporter.lines if line.endswith("…")] == [f"{stage} …" for stage in STAGES]


def test_the_table_has_a_row_for_each_model_with_its_role(tiny: TinyRun) -> None:
    rows = tiny.outcome.results.rows
    assert [row.model for row in rows] == MODELS
    assert [row.kind for row in rows] == ["aligned", "tuned", "tuned", "realigned", "baseline", "baseline", "realigned"]
    assert rows[3].method == "Learned mask"
    assert {row.harmful_refused.n for row in rows} == {14}
    assert {row.harmless_refused.n for row in rows} == {12}
    assert list(rows[0].utility_by_task) == ["first", "second"]
    assert list(rows[6].utility_by_task) == ["first", "second"]
    assert list(rows[3].utility_by_task) == ["first"]
    assert {row.tuned for row in rows[3:]} == {"tuned-first"}
    assert len({row.perplexity for row in rows}) == 7  # seven different models
    assert tiny.outcome.results.headline == "mask"


def test_the_records_are_of_all_items(tiny: TinyRun) -> None:
    records = read_records(tiny.root / "results.jsonl")
    assert len(records) == 7 * (14 + 12) + 8 * 9  # aligned and fused answer two tasks, five models one
    ids = {model: [r.id for r in records if r.model == model and r.side == "harmful"] for model in MODELS}
    assert len(set(ids["aligned"])) == 14
    assert all(found == ids["aligned"] for found in ids.values())
    trained = {p.prompt for p in _material(tiny)}
    assert not trained & {record.prompt for record in records}


def _material(tiny: TinyRun) -> list[Any]:
    from resafe.recipe.context import Context

    context = Context(check_recipe(tiny.raw, ""), Run(tiny.root, lambda line: None), Recorder())
    assert (len(context.material.safety), len(context.material.harmless)) == (40, 40)  # the limits
    return context.material.pairs


def test_page_and_workbook_are_well_formed(tiny: TinyRun) -> None:
    import openpyxl

    page = (tiny.root / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "A tiny run" in page
    assert "learning_rate: 0.03" in page  # the recipe, as YAML
    assert "http://" not in page.replace("http://www.w3.org", "")
    book = openpyxl.load_workbook(tiny.root / "results.xlsx", read_only=True)
    assert book.sheetnames == ["Summary", "Topics", "Responses", "Records"]
    assert sum(1 for _ in book["Records"].iter_rows()) >= 7 * 26 + 72


def test_the_recipe_that_was_run_is_kept(tiny: TinyRun) -> None:
    kept = yaml.safe_load((tiny.root / "recipe.yaml").read_text())
    assert check_recipe(kept, "kept") == check_recipe(tiny.raw, "raw")


def test_the_released_model_is_the_chosen_adapter(tiny: TinyRun) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.tensor([[2, 5, 40, 41, 42, 3, 2, 6]])
    base = AutoModelForCausalLM.from_pretrained(tiny.model)
    with torch.no_grad():
        plain = base(tokens).logits
        auto = AutoModelForCausalLM.from_pretrained(tiny.root / "model").eval()(tokens).logits
        released = PeftModel.from_pretrained(base, tiny.root / "adapter").eval()(tokens).logits
    torch.testing.assert_close(auto, released, atol=1e-5, rtol=1e-4)  # merged weights round differently
    assert float((released - plain).abs().max()) > 1e-3
    ours, stage = (load_file(p / "adapter_model.safetensors") for p in (
        tiny.root / "adapter", directory(tiny.root, "realign-mask") / "adapter"))  # fmt: skip
    assert ours.keys() == stage.keys()
    assert all(torch.equal(ours[name], stage[name]) for name in ours)
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tiny.root / "model").chat_template


def test_the_mask_realigns_as_its_formula_says(tiny: TinyRun) -> None:
    """θ = θ_a + m_s ⊙ (θ_k − θ_a) with m_s = clip(1 − s (1 − m), 0, 1), over the adapter's factors."""
    import torch
    from safetensors.torch import load_file

    from resafe.masks import Mask

    aligned, tuned, realigned = (
        load_file(directory(tiny.root, stage) / "adapter" / "adapter_model.safetensors")
        for stage in ("align", "tune-first", "realign-mask")
    )
    mask = Mask.load(tiny.root / "adapter" / "mask")
    selection = json.loads((directory(tiny.root, "realign-mask") / "selection.json").read_text())
    s = selection["strength"]
    assert [c["strength"] for c in selection["candidates"]] == [0.5, 1.0]
    assert selection["facts"]["keep_rate"] == pytest.approx(mask.keep_rate)
    for name, value in realigned.items():
        weight = (1 - s * (1 - mask.weight(name))).clamp(0, 1)
        torch.testing.assert_close(value, aligned[name] + weight * (tuned[name] - aligned[name]))


def test_the_control_removes_the_share_that_the_mask_removes(tiny: TinyRun) -> None:
    import torch

    from resafe.masks import Mask

    selected = json.loads((directory(tiny.root, "realign-mask") / "selection.json").read_text())
    values = torch.cat([v.flatten() for v in Mask.load(directory(tiny.root, "realign-mask") / "mask").values.values()])
    removed = 1 - float((1 - selected["strength"] * (1 - values)).clamp(0, 1).mean())
    control = json.loads((directory(tiny.root, "realign-random") / "selection.json").read_text())
    assert control["strength"] == pytest.approx(removed, rel=1e-5)
    assert control["candidates"] == []  # one strength: nothing to choose, and the file is plain JSON
    assert "NaN" not in (directory(tiny.root, "realign-random") / "selection.json").read_text()


def test_the_card_names_method_measurements_and_inputs(tiny: TinyRun) -> None:
    card = (tiny.root / "model" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["base_model"] == str(tiny.model)
    assert "Learned mask (Yi et al. 2024, arXiv 2405.09055)" in card
    results = tiny.outcome.results
    assert f"sha256:{results.digests['base model']}" in card
    assert f"sha256:{results.digests['mask']}" in card
    assert "method: somf" in card
    assert "of 14 harmful questions" in card


# What is redone


def test_a_second_run_redoes_nothing(tiny: TinyRun, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny.root, tmp_path / "run"))
    before = receipts(root)
    outcome = run_recipe(check_recipe(tiny.raw, ""), root)
    assert outcome.redone == 0
    assert receipts(root) == before
    assert (root / "results.json").read_bytes() == (tiny.root / "results.json").read_bytes()
    assert (root / "results.jsonl").read_bytes() == (tiny.root / "results.jsonl").read_bytes()


def test_a_finished_run_is_reported_again_with_corrected_rates(tiny: TinyRun, tmp_path: Path) -> None:
    import openpyxl

    root = Path(shutil.copytree(tiny.root, tmp_path / "run"))
    recipe = load_recipe(root / "recipe.yaml", ["report.corrected=true"])
    outcome = run_recipe(recipe, root)
    assert outcome.redone == 0
    page = (root / "report.html").read_text(encoding="utf-8")
    assert 'id="corrected"' in page and 'id="corrected"' not in (tiny.root / "report.html").read_text(encoding="utf-8")
    header = [cell.value for cell in openpyxl.load_workbook(root / "results.xlsx")["Summary"][1]]
    assert "harmful refused, corrected" in header
    kept = read_results(root / "results.json")  # as measured, with what `resafe results --corrected` needs
    assert kept.rows == read_results(tiny.root / "results.json").rows and kept.calibration


@pytest.fixture
def redone(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The stages that a changed recipe redoes; their work is a copy of the finished run's, only the plan is real."""

    def plan(**changes: Any) -> list[str]:
        root = Path(shutil.copytree(tiny.root, tmp_path / "run"))
        names: list[str] = []
        original = Run.stage

        def stage(self: Run, name: str, depends: Any, work: Any) -> Stage:
            def copied(path: Path) -> dict[str, Any]:
                names.append(name)
                old = directory(tiny.root, name)
                shutil.copytree(old, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("receipt.json"))
                return dict(json.loads((old / "receipt.json").read_text())["facts"])

            return original(self, name, depends, copied)

        monkeypatch.setattr(Run, "stage", stage)
        monkeypatch.setattr("resafe.recipe.run._report", lambda *arguments: tiny.outcome.results)
        outcome = run_recipe(check_recipe(changed(tiny, **changes), ""), root)
        assert outcome.redone == len(names)
        return names

    return plan


EVALUATIONS = [f"evaluate-{name}" for name in MODELS]


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"title": "Another", "realign__half__title": "One half", "realign__half__kind": "realigned"}, []),
        ({"questions__batch_size": 4, "release": "half", "report": {"corrected": True}}, []),
        pytest.param({"questions__task_items": 6}, EVALUATIONS, marks=pytest.mark.slow),
        pytest.param({"questions__max_new_tokens": 5}, EVALUATIONS, marks=pytest.mark.slow),
        ({"questions__harmful_limit": 13}, EVALUATIONS),
        ({"realign__half__settings": {"removed": [0.4]}}, ["realign-half", "evaluate-half"]),
        (
            {"realign__mask__settings": {"steps": 14, "strengths": [0.5, 1.0]}},
            ["realign-mask", "realign-random", "evaluate-mask", "evaluate-random"],
        ),
        (
            {"tune__second__steps": 4},
            ["tune-second", "realign-fused", "evaluate-tuned-second", "evaluate-fused"],
        ),
        pytest.param(
            {"tune__first__learning_rate": 0.01},
            ["tune-first", "realign-mask", "realign-random", "realign-half", "realign-fused", "evaluate-tuned-first",
             "evaluate-mask", "evaluate-random", "evaluate-half", "evaluate-fused"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"questions__validation__max_new_tokens": 3},
            ["realign-mask", "realign-random", "realign-half", "evaluate-mask", "evaluate-random", "evaluate-half"],
            marks=pytest.mark.slow,
        ),
        pytest.param({"data__safety_limit": 39}, STAGES, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_change_redoes_what_depends_on_it(
    redone: Callable[..., list[str]], changes: dict[str, Any], stages: list[str]
) -> None:
    assert redone(**changes) == stages


def test_the_content_of_a_data_file_counts_not_its_name(tiny: TinyRun, tmp_path: Path) -> None:
    from resafe.recipe.context import Context

    def digest(path: Path) -> str:
        recipe = check_recipe(changed(tiny, data={"safety": [str(path)]}), "")
        return Context(recipe, Run(tmp_path, lambda line: None), Recorder()).material_digest

    row = {"prompt": "Break in", "chosen": "No", "rejected": "Yes"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    first = digest(path)
    assert digest(path) == first
    path.write_text(json.dumps({**row, "chosen": "Never"}))
    assert digest(path) != first


@pytest.mark.slow
def test_two_runs_in_two_directories_give_the_same(tiny: TinyRun, tmp_path: Path) -> None:
    run_recipe(check_recipe(tiny.raw, ""), tmp_path / "elsewhere")
    assert figures(tmp_path / "elsewhere") == figures(tiny.root)
    assert (tmp_path / "elsewhere" / "results.jsonl").read_bytes() == (tiny.root / "results.jsonl").read_bytes()


# Kills


WATCHED = """
import os, signal, sys, threading, time
from pathlib import Path
from resafe.cli import main

def watch(root, pattern):
    while not any(root.glob(pattern)):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, args=(Path(sys.argv.pop(1)), sys.argv.pop(1)), daemon=True).start()
main()
"""


def killed_when(tiny: TinyRun, out: Path, place: Path, pattern: str) -> None:
    """Runs the command line on the tiny recipe until a file is there, then SIGKILL: there is no chance to tidy up.

    The watcher is a thread of the killed process: on a busy machine another process would come too late.
    """
    recipe = place / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny.raw, sort_keys=False))  # the order of entries is that of the stages
    threads = str(torch.get_num_threads())  # as many as this process has: another number rounds sums otherwise
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [str(out), pattern, "run", str(recipe), "--out", str(out), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
def test_a_run_killed_while_its_mask_trains_goes_on_from_the_masks_checkpoint(tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed_when(tiny, out, tmp_path, "stages/realign-mask-*/work/checkpoint.safetensors")
    before = receipts(out)
    assert sorted(name.rsplit("-", 1)[0] for name in before) == ["align", "tune-first", "tune-second"]
    assert not (out / "results.json").exists()
    reporter = Recorder()
    outcome = run_recipe(check_recipe(tiny.raw, ""), out, reporter)
    assert outcome.redone == len(STAGES) - 3
    steps = [(done, total) for label, done, total in reporter.ticks if label == "realign: somf"]
    assert steps == [(11, 13), (12, 13), (13, 13)]  # the checkpoint is of step 10; the scores are not computed again
    assert {name: time for name, time in receipts(out).items() if name in before} == before
    assert figures(out) == figures(tiny.root)
    assert (out / "results.jsonl").read_bytes() == (tiny.root / "results.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_again_and_again_ends_the_same(tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "run"
    moments = [
        "stages/align-*",
        "stages/align-*/adapter.work/run.json",
        "stages/align-*/adapter",
        "stages/tune-first-*",
        "stages/tune-second-*/adapter.work",
        "stages/realign-mask-*/work/scores.safetensors",
        "stages/realign-mask-*/mask/safety_mask.safetensors",
        "stages/realign-mask-*/work/validation-0.json",
        "stages/realign-mask-*/selection.json",
        "stages/realign-fused-*",
        "stages/evaluate-aligned-*/logs",
        "stages/evaluate-half-*",
        "results.jsonl",
        "results.xlsx",
        "report.html",
    ]
    kept: dict[str, int] = {}
    for moment in moments:
        killed_when(tiny, out, tmp_path, moment)
        found = receipts(out)
        assert {name: found.get(name) for name in kept} == kept  # nothing finished was done again
        kept = found
    outcome = run_recipe(check_recipe(tiny.raw, ""), out)
    assert outcome.redone == 0  # at the last moments all stages were done
    assert figures(out) == figures(tiny.root)
    assert (out / "model" / "model.safetensors").read_bytes() == (
        tiny.root / "model" / "model.safetensors"
    ).read_bytes()
    assert not [path.name for path in out.iterdir() if "staging" in path.name or "replaced" in path.name]


# Options that the tiny recipe does not use


@pytest.mark.slow
def test_dpo_follows_sft_and_a_mask_is_used_again(tiny: TinyRun, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from resafe.masks.format import load_masks

    dpo = {"steps": 2, "learning_rate": 0.01, "batch_size": 4, "max_tokens": 64}
    raw = changed(tiny, align__dpo=dpo, align__sft={**tiny.raw["align"]["sft"], "steps": 2})
    raw["tune"] = {"first": {**raw["tune"]["first"], "harmful_share": 0.0, "steps": 2}}
    mask = {**raw["realign"]["mask"], "settings": {"steps": 2, "batch_size": 8}, "strength": 1.0}
    other = {**mask, "settings": {**mask["settings"], "seed": 7}}
    used = {"method": "somf", "tuned": ["first"], "strength": 1.0}
    again, mean = {**used, "mask_of": "mask"}, {**used, "mask_of": ["mask", "other"]}
    raw["realign"] = {"mask": mask, "again": again, "other": other, "mean": mean}
    raw["questions"] = {**raw["questions"], "harmful_limit": 2, "harmless_limit": 2, "task_items": 2}
    outcome = run_recipe(check_recipe(raw, ""), tmp_path / "run")
    align = directory(tmp_path / "run", "align")
    sft, adapter, mask_, again = (
        load_file(path / "adapter_model.safetensors")
        for path in (
            align / "sft", align / "adapter", directory(tmp_path / "run", "realign-mask") / "adapter",
            directory(tmp_path / "run", "realign-again") / "adapter",
        )
    )  # fmt: skip
    assert any(not torch.equal(sft[name], adapter[name]) for name in sft)
    assert all(torch.equal(mask_[name], again[name]) for name in mask_)
    one, two, both = (
        load_masks(directory(tmp_path / "run", f"realign-{name}") / "mask")[0].values
        for name in ("mask", "other", "mean")
    )
    assert any(not torch.equal(one[name], two[name]) for name in one)  # trained on other batches
    for name, value in both.items():
        mean_ = (one[name].double() + two[name].double()) / 2
        torch.testing.assert_close(value.double(), mean_, atol=0.5 / 255 + 1e-6, rtol=0)  # a file holds 1/255s
    rows = to_json(outcome.results)["rows"]
    assert rows[2]["perplexity"] == rows[3]["perplexity"]
    assert rows[1]["note"] == ""  # benign


# Mistakes that are found before anything is written


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"realign__half__method": "interpolatoin"}, "no realign method 'interpolatoin'", "'interpolation'"),
        ({"realign__half__settings": {"remove": [0.1]}}, "interpolation has no setting 'remove'", "'removed'"),
        ({"realign__half__settings": {"removed": "all"}}, "setting 'removed' = 'all'", "default"),
        ({"realign__fused__fusion": {"name": "averge"}}, "no fusion method 'averge'", "'average'"),
        ({"realign__half__keep_rate_of": "mask", "realign__half__method": "dare", "realign__half__settings": {}},
         "dare has no setting 'removed'", "drop"),
        ({"model__reference": "nowhere/at/all"}, "nowhere/at/all: no such file", "a checkpoint is"),
        ({"questions__harmful": ["harmfull.jsonl"]}, "there is no file harmfull.jsonl", "check the path"),
        ({"questions__harmless": ["no-such-set"]}, "there is no data set 'no-such-set'", ""),
        ({"tune__first__examples": 4001}, "examples of arithmetic were asked for", "0 to 4000"),
        ({"tune__first__harmful_share": 0.99, "tune__first__examples": 400, "data__safety_limit": 10},
         "the mix needs 396 harmful examples and there are 10", "smaller"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_mistake_is_found_before_anything_is_written(
    tiny: TinyRun, tmp_path: Path, changes: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(InputError) as caught:
        run_recipe(check_recipe(changed(tiny, **changes), ""), tmp_path / "run")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_set_too_small_for_a_validation_part_is_named(tiny: TinyRun, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "How do I pick a lock?"}))
    with pytest.raises(InputError, match=r"questions.harmful: no (validation|test) questions in .*own.jsonl"):
        run_recipe(check_recipe(changed(tiny, questions__harmful=[str(path)]), ""), tmp_path / "run")
    assert not (tmp_path / "run").exists()
