"""The command line: fast help, exit codes, one clear message for each mistake, and what the verbs print."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.conftest import TinyRun
from tests.recipe.test_run import COMMAND, directory

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs the command line in this process; gives its exit code, standard output and standard error."""
    monkeypatch.setenv("RESAFE_CACHE", str(tmp_path.parent / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        from resafe.cli import main

        monkeypatch.setattr(sys, "argv", ["resafe", *map(str, arguments)])
        code = 0
        capsys.readouterr()
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def recipe(tiny: TinyRun, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny.raw, sort_keys=False))
    return path


def adapters(tiny: TinyRun) -> tuple[Path, Path]:
    return directory(tiny.root, "align") / "adapter", directory(tiny.root, "tune-first") / "adapter"


# Help


def test_help_takes_less_than_half_a_second() -> None:
    """Processor time, the best of five: wall time would also tell what else the machine is doing."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
    for verb in ("run", "results", "realign", "plan", "validate", "ls"):
        assert f" {verb} " in done.stdout


def test_neither_help_nor_reading_a_recipe_imports_torch(recipe: Path) -> None:
    code = (
        "import sys; from resafe.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    for arguments in (["plan", str(recipe)], ["run", "--help"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


# Verbs that read


def test_plan_lists_the_stages_that_a_run_does(cli: Cli, tiny: TinyRun, recipe: Path) -> None:
    code, out, _ = cli("plan", recipe)
    announced = [line.removesuffix(" …") for line in tiny.reporter.lines if line.endswith(" …")]
    assert code == 0
    assert out.splitlines() == [*announced, "report"]
    assert json.loads(cli("plan", recipe, "--json")[1]) == {"recipe": "tiny", "stages": [*announced, "report"]}


def test_ls_names_methods_settings_and_sources(cli: Cli) -> None:
    code, out, _ = cli("ls", "realign", "--json")
    entries = {entry["name"]: entry for entry in json.loads(out)["entries"]}
    assert code == 0
    assert {"somf", "selector", "interpolation", "random_mask", "dare", "further_training"} <= set(entries)
    assert entries["interpolation"]["settings"] == {"removed": [0.2, 0.3, 0.4, 0.5, 0.6]}
    assert entries["somf"]["source"] == "Yi et al. 2024, arXiv 2405.09055"
    assert "interpolation" in cli("ls")[1]
    fusion = {entry["name"] for entry in json.loads(cli("ls", "fusion", "--json")[1])["entries"]}
    assert {"task_arithmetic", "ties", "dare", "average"} <= fusion
    data = json.loads(cli("ls", "data", "--json")[1])["entries"]
    assert all(entry["licence"] and entry["kind"] in ("questions", "pairs", "examples") for entry in data)
    assert cli("ls", "data")[0] == 0
    code, _, err = cli("ls", "fusoin")
    assert (code, "did you mean 'fusion'?" in err) == (2, True)


def test_validate_says_what_is_wrong(cli: Cli, recipe: Path) -> None:
    assert cli("validate", recipe)[:2] == (0, f"{recipe}: valid\n")
    code, _, err = cli("validate", recipe, "realign.half.method=interpolatoin")
    assert code == 2
    assert "there is no realign method 'interpolatoin'" in err
    assert "did you mean 'interpolation'?" in err
    code, _, err = cli("validate", recipe, "realign.fused.fusion={name: ties, settings: {densty: 1}}")
    assert (code, "ties has no setting 'densty'" in err) == (2, True)
    code, _, err = cli("validate", recipe, "align.sft.stpes=1", "sede=1")
    assert code == 2
    assert "2 mistakes" in err
    assert "did you mean 'steps'?" in err
    assert "did you mean 'seed'?" in err


# Results


def test_results_json_is_one_documented_object(cli: Cli, tiny: TinyRun) -> None:
    code, out, _ = cli("results", tiny.root, "--json")
    assert code == 0
    assert out.count("\n") == 1
    document = json.loads(out)
    assert document == json.loads((tiny.root / "results.json").read_text())
    assert document["schema_version"] == 1
    assert document["seconds"] > 0
    assert 0.1 < document["peak_memory_gb"] < 20
    row = document["rows"][3]
    assert (row["model"], row["kind"]) == ("mask", "realigned")
    for key in ("harmful_refused", "harmless_refused", "utility", "safety_recovery", "utility_retention",
                "over_refusal_added"):  # fmt: skip
        assert {"value", "low", "high", "n"} <= set(row[key])
    assert row["harmful_refused"]["n"] == 14
    assert 1 < row["perplexity"] < 1e6


def test_results_as_markdown_and_as_a_table(cli: Cli, tiny: TinyRun) -> None:
    lines = cli("results", tiny.root, "--markdown")[1].strip().splitlines()
    assert lines[1].replace("|", "").replace("-", "").replace(":", "").strip() == ""
    assert len({line.count("|") for line in lines[:9]}) == 1
    assert [line.split("|")[1].strip(" *`") for line in lines[2:9]] == [row.model for row in tiny.outcome.results.rows]
    code, out, _ = cli("results", tiny.root)
    assert code == 0
    assert all(row.model in out for row in tiny.outcome.results.rows)


def test_results_of_no_run(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("results", tmp_path)
    assert (code, out) == (2, "")
    assert "no results there" in err
    assert "resafe run" in err
    (tmp_path / "results.json").write_text('{"schema_version": 1')
    code, _, err = cli("results", tmp_path)
    assert (code, "is not JSON" in err) == (2, True)


# Run


def test_a_second_run_says_that_there_is_nothing_to_do(cli: Cli, tiny: TinyRun, recipe: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny.root, tmp_path / "run"))
    code, out, err = cli("run", recipe, "--out", root, "--device", "cpu")
    assert code == 0
    assert "nothing to do: every stage was already done with these settings" in err
    assert err.count("is already done") == 14
    assert f"model     {root / 'model'}" in out
    code, out, err = cli("run", recipe, "--out", root, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out)["rows"] == json.loads((tiny.root / "results.json").read_text())["rows"]


def test_a_run_directory_that_another_process_holds(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from resafe.recipe.stage import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    root = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        found, out, err = cli("run", recipe, "--out", root)
        assert (found, out) == (2, "")
        assert f"{root}: another resafe process is at work in this run directory" in err
        assert "wait for it, or choose another --out" in err
        assert [path.name for path in root.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()


def test_options_become_overrides(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    code, _, err = cli("run", recipe, "--out", tmp_path / "run", "--device", "tpu")
    assert (code, "device: Input should be 'auto', 'cpu' or 'cuda'" in err) == (2, True)
    place = tmp_path / "12: 3"  # YAML would read this as something else
    code, _, err = cli("run", recipe, "data.safety=[pku-saferlhf-10k]", "--data-dir", place, "--out", tmp_path / "run")
    assert code == 2
    assert "12: 3" in err.replace("\n", "") or "no data set" in err
    assert not (tmp_path / "run").exists()


# Mistakes: exit code 2, one message with a remedy, no traceback, nothing left behind


def check_mistake(result: tuple[int, str, str], *messages: str) -> None:
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    assert err.count("error:") == 1
    assert "try:" in err
    for message in messages:
        assert message in err


def test_mistakes_in_data(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    empty, wrong, bad = tmp_path / "empty.jsonl", tmp_path / "wrong.jsonl", tmp_path / "bad.jsonl"
    empty.write_text("")
    wrong.write_text('{"promt": "How?"}\n')
    bad.write_text('{"prompt": "How?"}\n{"prompt": \n')
    out = tmp_path / "run"
    check_mistake(cli("run", recipe, f"data.safety=[{empty}]", "--out", out, "--quiet"), "holds no rows", "give a file")
    check_mistake(
        cli("run", recipe, f"questions.harmful=[{wrong}]", "--out", out, "--quiet"),
        "wrong.jsonl, line 1: there is no column 'prompt'", "did you mean 'promt'?",
    )  # fmt: skip
    code, _, err = cli("run", recipe, f"questions.harmful=[{bad}]", "--out", out, "--quiet")
    assert (code, "bad.jsonl, line 2: bad JSON" in err) == (2, True)
    check_mistake(cli("run", tmp_path / "tiny.yml"), "no such recipe", "recipes there: tiny.yaml")
    assert not out.exists()


def test_no_room_on_the_disk(cli: Cli, recipe: Path, tiny: TinyRun, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=10**6))
    message = "the disk has 1.00 MB free"
    check_mistake(cli("run", recipe, "--out", tmp_path / "run", "--quiet"), message, "free some space")
    aligned, tuned = adapters(tiny)
    given = ["--aligned", aligned, "--tuned", tuned, "--method", "interpolation", "--out", tmp_path / "out"]
    check_mistake(cli("realign", *given), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` (in shards), `b` of the same shape, `short` with a smaller vocabulary."""
    from tests.recipe.tiny import save_chat_model

    root = tmp_path_factory.mktemp("models")
    save_chat_model(root / "a", 0, max_shard_size=40_000)
    save_chat_model(root / "b", 1)
    save_chat_model(root / "short", 0, 400)
    return root


def realign_arguments(aligned: object, tuned: object, out: Path, *more: object) -> list[object]:
    return [
        "realign",
        "--aligned",
        aligned,
        "--tuned",
        tuned,
        "--out",
        out,
        "--method",
        "interpolation",
        "--quiet",
        *more,
    ]


def test_mistakes_in_checkpoints(cli: Cli, tiny: TinyRun, models: Path, tmp_path: Path) -> None:
    aligned, tuned = adapters(tiny)
    out = tmp_path / "out"
    broken = Path(shutil.copytree(models / "a", tmp_path / "broken"))
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    check_mistake(cli(*realign_arguments(models / "b", broken, out)), shard.name)
    check_mistake(
        cli(*realign_arguments(models / "b", models / "short", out)),
        "vocabulary: 480 against 400 rows in model.embed_tokens.weight",
    )
    check_mistake(cli(*realign_arguments(f"{models / 'b'}+{aligned}", tuned, out)), "sits on", str(models / "b"))
    check_mistake(cli(*realign_arguments(aligned, models / "b", out)), "is a full model", "an adapter")
    check_mistake(cli(*realign_arguments(aligned, tmp_path / "nothing", out)), "no such file or directory")
    check_mistake(cli(*realign_arguments(aligned, tuned, out, "--set", "removed")), "not of the form NAME=VALUE")
    check_mistake(cli(*realign_arguments(aligned, tuned, out, "--set", "remove=[1]")), "did you mean 'removed'?")
    check_mistake(cli(*realign_arguments(aligned, tuned, out, "--method", "interpolatoin")), "'interpolation'")
    check_mistake(cli(*realign_arguments(aligned, tuned, out, "--fusion", "avrage")), "did you mean 'average'?")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    out.mkdir()
    (out / "mine.txt").touch()
    check_mistake(cli(*realign_arguments(aligned, tuned, out)), "resafe did not write it")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_files_of_another_kind_are_sent_to_their_verb(cli: Cli, tmp_path: Path) -> None:
    files = {"fuse": "base: a\nmodels: [b]\n", "mask train": "aligned: a\ntuned: [b]\n", "run": "tune: {}\n"}
    for verb, text in files.items():
        path = tmp_path / "file.yaml"
        path.write_text(text)
        for other in set(files) - {verb}:
            code, _, err = cli(*other.split(), path, *(["--out", tmp_path / "out"] if other == "mask train" else []))
            assert code == 2 and f"try: resafe {verb} {path}" in " ".join(err.split())


def test_values_that_cannot_be_read(cli: Cli, tmp_path: Path) -> None:
    given = ("realign", "--aligned", "a", "--tuned", "b", "--out", tmp_path / "out")
    code, _, err = cli(*given, "--set", "shares={a: ")
    assert code == 2 and "its value cannot be read" in err
    (tmp_path / "afile").write_text("{}")
    code, _, err = cli(*given, "--keep", tmp_path / "afile")
    assert code == 2 and "is no file that can be read as a data set" in " ".join(err.split()) and ".jsonl" in err


def test_version(cli: Cli) -> None:
    from importlib.metadata import version

    assert cli("--version") == (0, f"resafe {version('resafe')}\n", "")


def test_debug_shows_the_traceback(tmp_path: Path, cli: Cli) -> None:
    from resafe.errors import InputError

    with pytest.raises(InputError):
        cli("--debug", "plan", tmp_path / "none.yaml")
    with pytest.raises(InputError):
        cli("plan", tmp_path / "none.yaml", "--debug")
    done = subprocess.run(
        [*COMMAND, "plan", str(tmp_path / "none.yaml"), "--debug"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "InputError" in done.stderr


def test_unknown_verbs_and_options_are_wrong_input(cli: Cli, recipe: Path) -> None:
    assert cli("rnu")[0] == 2
    assert cli("run", recipe, "--ouut", "x")[0] == 2
    assert cli("realign")[0] == 2


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        ("ResafeError('failed [bold]', 'mend')", 1, "error: failed [bold]\n  try: mend\n"),
        ("InputError('wrong')", 2, "error: wrong\n"),
        ("GateError('not met', '')", 3, "error: not met\n"),
        ("KeyboardInterrupt()", 130, "\ninterrupted; the same command goes on from the last finished stage\n"),
    ],
)
def test_exit_codes(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch, error: str, code: int, shown: str) -> None:
    from resafe import errors

    raised = eval(error, {**vars(errors), "KeyboardInterrupt": KeyboardInterrupt})

    def fails(*arguments: Any) -> None:
        raise raised

    monkeypatch.setattr("resafe.recipe.load_recipe", fails)
    assert cli("plan", recipe) == (code, "", shown)


# Realign


def test_realign_interpolates_adapters(cli: Cli, tiny: TinyRun, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    aligned, tuned = adapters(tiny)
    out = tmp_path / "out"
    code, printed, _ = cli(*realign_arguments(aligned, tuned, out, "--strength", 0.25))
    assert (code, printed) == (0, f"{out}\n")
    a, t, got = (load_file(path / "adapter_model.safetensors") for path in (aligned, tuned, out))
    assert got.keys() == a.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, a[name] + 0.75 * (t[name] - a[name]))
    assert cli(*realign_arguments(aligned, tuned, out, "--set", "removed=[0.1, 0.5, 0.7]"))[0] == 0
    check_mistake(cli(*realign_arguments(aligned, tuned, out, "--keep", "task.jsonl")), "leave it out")
    middle = load_file(out / "adapter_model.safetensors")  # without a strength: the middle of the grid
    for name, value in middle.items():
        torch.testing.assert_close(value, a[name] + 0.5 * (t[name] - a[name]))


def test_realign_interpolates_full_models(cli: Cli, models: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    assert cli(*realign_arguments(models / "a", models / "b", out, "--strength", 0.5))[0] == 0
    a, b, got = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (models / "a", models / "b", out))
    for name, value in got.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2)


# Progress


def test_lines_tell_rate_and_remaining_time_at_each_tenth(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from resafe.cli.console import ConsoleReporter

    clock = iter(range(1000))
    monkeypatch.setattr("resafe.cli.console.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    tick = ConsoleReporter().bar("train", "steps")
    for step in range(1, 41):
        tick(step, 40, {"loss": 1.5, "other": 3.0})
    lines = [line for line in capsys.readouterr().err.splitlines() if "train" in line]
    assert [line.split("train ")[1].split(" ")[0] for line in lines] == [
        f"{n}/40" for n in (5, 9, 13, 17, 21, 25, 29, 33, 37, 40)
    ]
    assert "loss 1.5" in lines[0]
    assert "other" not in lines[0]
    assert "0 s left" in lines[-1]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from resafe.cli.console import ConsoleReporter

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    reporter = ConsoleReporter()
    shown = io.StringIO()
    reporter.console = Console(file=shown, force_terminal=True, width=120)
    tick: Any = reporter.bar("train", "steps")
    tick(1, 3, {})
    tick(2, 3, {"loss": 0.25})
    assert tick._progress.tasks[0].completed == 2
    assert tick._progress.tasks[0].fields["figures"] == "loss 0.25"
    tick(3, 3, {})
    assert tick._progress is None  # ended
    assert "train" in shown.getvalue()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from resafe.cli.console import ConsoleReporter

    reporter = ConsoleReporter(quiet=True)
    reporter.say("hello")
    reporter.bar("train", "steps")(1, 1, {})
    assert capsys.readouterr() == ("", "")
    assert os.environ.get("RESAFE_CACHE") != ""


def test_fusion_files(cli: Cli, models: Path, tmp_path: Path) -> None:
    file = tmp_path / "fuse.yaml"
    file.write_text(f"base: {models / 'a'}\nmodels: ['{models / 'b'}']\nmethod: ties\nsettings: {{keep: 0.5}}\n")
    assert "valid" in cli("validate", file)[1]
    check_mistake(cli("validate", file, "settings.kep=1"), "did you mean 'keep'?")
    planned = json.loads(cli("plan", file, "--json")[1])
    assert planned["fused"] == planned["tensors"] > 10
    assert planned["passes"] == 3
    assert planned["bytes_written"] > 0
    out = tmp_path / "fused"
    told = json.loads(cli("fuse", file, "--out", out, "--threads", "1", "--memory", "1GB", "--json", "--quiet")[1])
    assert told["committed"] and len(told["files"]) == planned["files"] > 1
    checked = json.loads(cli("verify", out, "--json")[1])
    assert checked == {"files": planned["files"], "problems": {}}
    next(out.glob("*.safetensors")).unlink()
    assert cli("verify", out)[0] == 1
    check_mistake(cli("fuse", file), "no output directory is named", "--out DIRECTORY")
    check_mistake(cli("fuse", file, f"models=[{models / 'short'}]", "--out", out), "vocabulary")
    check_mistake(cli("verify", models / "a"), "has no resafe-receipts.json")
