"""`align` and `tune`: from references to a directory, what is said about the rows, presets, and two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from resafe.errors import InputError
from resafe.training.presets import preset, presets
from resafe.training.settings import DpoSettings, SftSettings
from resafe.training.start import check_four_bit
from resafe.training.trainers import check_trackers
from resafe.training.verbs import Start, align, tune

QUICK = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0}
PUBLISHED_FULL = {
    "alpaca_gpt4_en": (1e-6, 2), "alpaca_gpt4_zh": (1e-5, 2), "alpaca_hindi": (1e-5, 2), "codealpaca": (1e-5, 5),
    "gsm8k": (1e-5, 5),
}  # fmt: skip
"""Learning rate and epochs of the published full fine-tuning on each task (arXiv:2405.09055)."""
CPU = Start(device="cpu", dtype="float32", system="", lora={"rank": 4})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def test_tune_writes_adapter_curve_and_rows(base: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = tune(base, data, out=out, settings=QUICK, max_bad_share=0.1, start=CPU)
    curve = json.loads((out / "training.json").read_text())
    assert curve["losses"] == list(result.losses)
    assert len(curve["losses"]) == 3
    facts = json.loads((out / "data.json").read_text())
    (source,) = facts["sources"]
    assert (source["rows"], source["kept"], source["bad"]) == (41, 40, {"too long": 1})
    assert source["named"]["too long"][0].startswith("mine.jsonl, line 8: its prompt has 12")
    assert "harmful" in facts["overlap"]["compared_with"]
    with pytest.raises(InputError, match=r"1 of 41 rows cannot be used \(1 too long\)"):
        tune(base, data, out=tmp_path / "b", settings=QUICK, start=CPU)


def test_tune_continues_an_adapter(base: str, data: str, tmp_path: Path) -> None:
    tune(base, data, out=tmp_path / "a", settings=QUICK, max_bad_share=0.1, start=CPU)
    plain = Start(device="cpu", dtype="float32", system="")
    small = {**QUICK, "learning_rate": 1e-5}
    tune(tmp_path / "a", data, out=tmp_path / "b", settings=small, max_bad_share=0.1, start=plain)
    before, after = weights(tmp_path / "a"), weights(tmp_path / "b")
    moved = max((before[name] - after[name]).abs().max().item() for name in before)
    assert 0 < moved <= 3.1e-5  # from where it was: three steps of 1e-5
    with pytest.raises(InputError, match="is an adapter, which is continued"):
        tune(tmp_path / "a", data, out=tmp_path / "c", settings=QUICK, max_bad_share=0.1, start=CPU)


@pytest.mark.slow
def test_full_gradient_checkpointing_gives_the_same_weights(base: str, data: str, tmp_path: Path) -> None:
    full = Start(device="cpu", dtype="float32", system="", full=True)
    for name, flag in (("a", False), ("b", True)):
        changes = {**QUICK, "learning_rate": 1e-3, "gradient_checkpointing": flag}
        tune(base, data, out=tmp_path / name, settings=changes, max_bad_share=0.1, start=full)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    # and with an adapter over frozen weights, where the inputs need gradients
    result = tune(
        base, data, out=tmp_path / "c", settings={**QUICK, "gradient_checkpointing": True}, max_bad_share=0.1, start=CPU
    )
    assert result.losses[-1] < result.losses[0]


def test_harmful_share_and_held_out_prompts(base: str, data: str, tmp_path: Path) -> None:
    result = tune(
        base, data, out=tmp_path / "a", settings=QUICK, examples=20, harmful_share=0.25, hold_out=0.2,
        max_bad_share=0.1, start=CPU,
    )  # fmt: skip
    facts = json.loads((result.path / "data.json").read_text())
    mix = facts["mix"]
    assert mix.pop("overlap")["dropped"] == 0 and "harmful" in facts["overlap"]["compared_with"]
    assert mix == {"rows": 20, "harmful_share": 0.25, "harmful": "embedded", "seed": 0}
    assert 2 <= len(facts["held_out"]) <= 16
    assert json.loads((result.path / "training.json").read_text())["rows"] == 20


@pytest.mark.slow
def test_align_killed_in_its_dpo_does_not_repeat_the_sft(base: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    seen: list[int] = []

    def stop(step: int, total: int, metrics: dict[str, float]) -> None:
        seen.append(total)
        if "margin" in metrics:
            raise Stop

    sft, dpo = {**QUICK, "steps": 2}, {**QUICK, "steps": 4}

    def run(name: str, progress: Any = None) -> Any:
        return align(base, out=tmp_path / name, sft=sft, dpo=dpo, examples=24, start=CPU, progress=progress)

    with pytest.raises(Stop):
        run("a", stop)
    seen.clear()
    run("a", lambda step, total, metrics: seen.append(total))
    assert seen == [4, 4, 4, 4]
    run("b")
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_align_runs_sft_then_dpo(base: str, tmp_path: Path) -> None:
    result = align(base, out=tmp_path / "safe", sft=QUICK, dpo={**QUICK, "beta": 0.2}, examples=24, start=CPU)
    assert result.losses[0] == pytest.approx(0.6931, abs=2e-4)  # ln 2: the reference is the adapter after SFT
    first, second = weights(tmp_path / "safe.sft"), weights(tmp_path / "safe")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    settings = json.loads((tmp_path / "safe" / "training.json").read_text())["settings"]
    assert settings["beta"] == 0.2
    with pytest.raises(InputError, match="no stages dpo, sft"):
        align(base, out=tmp_path / "x", stages=("dpo", "sft"), start=CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "lama3"}, "no preset 'lama3'"),
        ({"settings": {"learn_rate": 1}}, "no training setting 'learn_rate'"),
        ({"settings": {"steps": "many"}}, "'steps' is 'many', of the wrong kind\nInput should be a valid integer"),
        ({"settings": {"steps": 1.5}}, "'steps' is 1.5, of the wrong kind"),
        ({"settings": {"learning_rate": -1}}, "'learning_rate' is -1"),
        ({"harmful_share": 1.0}, "a harmful_share of 1"),
        ({"harmful_share": 1.5}, "harmful_share is 1.5"),
        ({"max_bad_share": -1}, "max_bad_share is -1"),
        ({"examples": 0}, "examples is 0"),
        ({"start": Start(device="tpu")}, "'tpu'"),
        ({"data_dir": Path("/no/such")}, "data_dir /no/such: no such directory"),
        ({"start": Start(lora={"alpha": -1.0}, device="cpu")}, "'alpha' is -1"),
        (
            {"start": Start(lora={"targets": "("}, device="cpu"), "settings": QUICK},
            "no LoRA adapter fits the model: missing",
        ),
        ({"start": Start(lora={"targets": ("nope",)}, device="cpu"), "settings": QUICK}, "no LoRA adapter fits"),
        ({"start": Start(lora={"rnk": 3}, device="cpu")}, "no LoRA setting 'rnk'"),
        ({"start": Start(lora={"rank": 3}, full=True, device="cpu")}, "a training of all weights"),
        ({"start": Start(four_bit=True, device="cpu")}, "needs CUDA"),
        ({"start": Start(report_to=("wandbb",), device="cpu")}, "no tracker 'wandbb'"),
        ({"start": Start(report_to=("none", "wandb"), device="cpu")}, "the tracker 'none' beside others"),
    ],
)
def test_wrong_settings_are_named(base: str, data: str, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune(base, data, out=tmp_path / "a", **{"max_bad_share": 0.1, **change})


def test_an_output_that_is_not_ours_is_refused_before_training(base: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for verb in (lambda out: tune("no/model", data, out=out), lambda out: align("no/model", out=out)):
        with pytest.raises(InputError, match="resafe did not write it"):
            verb(tmp_path / "mine")
        with pytest.raises(InputError, match="is a file, not a directory"):
            verb(data)
    with pytest.raises(InputError, match="refusal_share is 2"):
        align("no/model", out=tmp_path / "a", refusal_share=2)
    with pytest.raises(InputError, match="cannot be made: "):
        tune(base, data, out="/proc/no/such", settings=QUICK, max_bad_share=0.1, start=CPU)


def test_four_bit_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resafe.training.start.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package bitsandbytes"):
        check_four_bit("cuda", full=False)
    with pytest.raises(InputError, match="cannot be trained"):
        check_four_bit("cuda", full=True)


def test_figures_go_to_the_trackers_that_were_named(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    logged: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            assert args.report_to == ["mine"]
            logged.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mine", Tracker)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["mine"])
    told = replace(CPU, report_to=("mine",))
    result = tune(base, data, out=tmp_path / "a", settings=QUICK, max_bad_share=0.1, start=told)
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert losses == pytest.approx(list(result.losses)) and len(losses) == 3
    assert logged[0]["learning_rate"] == pytest.approx(1e-2)
    logged.clear()
    tune(base, data, out=tmp_path / "b", settings=QUICK, max_bad_share=0.1, start=CPU)
    assert not logged  # by default nothing is sent
    with pytest.raises(InputError, match="package of the tracker 'wandb' is not installed"):
        check_trackers(["wandb"])


def test_presets_hold_the_published_settings() -> None:
    for one in presets().values():
        SftSettings(**one.sft)
        SftSettings(**one.tune)
        DpoSettings(**one.dpo)
    for name in ("wizardlm-7b", "llama2-7b-chat"):
        found = preset(name)
        assert found.lora is not None
        assert (found.lora.rank, found.lora.targets) == (256, ("q_proj", "v_proj"))
        assert (found.sft["learning_rate"], found.dpo["learning_rate"], found.tune["learning_rate"]) == (
            1e-5,
            1e-5,
            5e-5,
        )
        assert (found.sft["epochs"], found.dpo["epochs"], found.tune["epochs"]) == (3, 3, 3)
    tiny = preset("tinyllama-full")
    assert tiny.lora is None
    assert (tiny.sft["learning_rate"], tiny.dpo["learning_rate"]) == (1e-5, 2e-7)
    assert {name: (tiny.tune_for(name)["learning_rate"], tiny.tune_for(name)["epochs"]) for name in PUBLISHED_FULL} == (
        PUBLISHED_FULL
    )


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(base: str, data: str, tmp_path: Path) -> None:
    """DDP under `accelerate launch`, two processes on the CPU, packed and streamed, against one with neither."""
    settings = [f"--set={name}={value}" for name, value in {**QUICK, "micro_batch_size": 2}.items()]
    common = [
        "tune", base, data, "--rank", "4", "--device", "cpu", "--dtype", "float32", "--system", "", "--quiet",
        "--max-bad-share", "0.1", "--json", *settings,
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(root / "recipes/accelerate/ddp-cpu.yaml"),
        "-m",
        "resafe",
    ]
    one = [sys.executable, "-m", "resafe", *common, "--out", str(tmp_path / "one")]
    two = [sys.executable, *launch, *common, "--stream", "--set=packing=true", "--out", str(tmp_path / "two")]
    printed = []
    for command in (one, two):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(json.loads(done.stdout.strip().splitlines()[-1]))
    assert printed[0]["first_loss"] == pytest.approx(printed[1]["first_loss"], abs=1e-3)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-4
    assert not (tmp_path / "two.work").exists()
