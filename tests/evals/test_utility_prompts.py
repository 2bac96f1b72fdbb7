"""Rendered requests of our tasks from local files, against those of `lm_eval.simple_evaluate` on the Hub's rows.

lm-eval runs as it is, by its own names; only `datasets.load_dataset` gives it the rows, as the Hub has them, and
`evaluate.load` a metric that runs no programs.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from resafe.evals.utility.names import TASKS, local_file
from resafe.evals.utility.tasks import CodeMetric

DATA = Path(os.environ.get("RESAFE_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; set RESAFE_DATA_DIR")

HUB = {  # (id, configuration) on the Hub → our name
    ("aps/super_glue", "copa"): "copa", ("cambridgeltl/xcopa", "zh"): "xcopa_zh", ("facebook/xnli", "hi"): "xnli_hi",
    ("openai/gsm8k", "main"): "gsm8k", ("openai/openai_humaneval", None): "humaneval",
}  # fmt: skip
COUNTS = {"copa": 100, "xcopa_zh": 500, "xnli_hi": 2490, "gsm8k": 1319, "humaneval": 164}
REQUESTS = {"copa": 2, "xcopa_zh": 2, "xnli_hi": 3, "gsm8k": 1, "humaneval": 1}  # of an item
LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2}  # the Hub's numbers


def recorder() -> Any:
    """A model of lm-eval that keeps what it is asked."""
    from lm_eval.api.model import LM

    class Recorder(LM):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[tuple[str, str, int, tuple[Any, ...]]] = []

        def _keep(self, kind: str, requests: Any) -> None:
            self.asked += [(kind, request.task_name, request.doc_id, request.args) for request in requests]

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            self._keep("loglikelihood", requests)
            return [(0.0, False)] * len(requests)

        def generate_until(self, requests: Any) -> list[str]:
            self._keep("generate_until", requests)
            return [""] * len(requests)

        def loglikelihood_rolling(self, requests: Any) -> Any:
            raise NotImplementedError

    return Recorder()


class NoPrograms(CodeMetric):
    """Stands for `code_eval`."""

    def compute(self, references: Any, predictions: Any, k: Any) -> Any:
        return {f"pass@{n}": 0.0 for n in k}, {}


def hub_rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    return [row | {"label": LABELS.get(row["label"], row["label"])} if "label" in row else row for row in rows]


def theirs(names: list[str], load: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What lm-eval itself asks."""
    import datasets
    import evaluate
    from lm_eval import simple_evaluate

    model = recorder()
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load)
        if "humaneval" in names:
            patch.setattr(evaluate, "load", lambda *_args, **_settings: NoPrograms())
        simple_evaluate(model=model, tasks=names, bootstrap_iters=0, log_samples=False, confirm_run_unsafe_code=True)
    return model.asked


def ours(names: list[str], data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What our tasks ask."""
    from resafe.evals.utility import code, evaluate_lm

    class Sandboxed(NoPrograms):
        def __init__(self, *_args: Any, **_settings: Any) -> None:
            """Nothing is set up."""

        def summary(self) -> dict[str, Any]:
            return {}

    model = recorder()
    monkeypatch.setattr(code, "SandboxedCode", Sandboxed)
    evaluate_lm("m", model, names, data_dir=data_dir, allow_code_execution="humaneval" in names)
    return model.asked


@needs_data
@pytest.mark.slow
def test_every_request_is_lm_evals_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of the files, worked examples included."""
    from datasets import Dataset, DatasetDict

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        task = HUB[path, name]
        splits = {split: hub_rows(local_file(DATA, task, split)) for split in TASKS[task].files}
        absent = next(iter(splits.values()))[:1]  # the Hub has a training split, too; nothing is taken from it here
        splits = {"train": absent, "validation": absent, "test": absent} | splits
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})

    names = list(COUNTS)
    expected, found = theirs(names, load, monkeypatch), ours(names, DATA, monkeypatch)
    assert Counter(task for _, task, _, _ in expected) == {name: COUNTS[name] * REQUESTS[name] for name in names}
    assert sorted(found, key=str) == sorted(expected, key=str)  # generation requests come in another order of tasks


@pytest.mark.slow
def test_every_request_of_mmlu_is_lm_evals_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 57 subjects, on made-up rows (the shared data have none), with worked examples from the dev split."""
    import lm_eval.tasks
    from datasets import Dataset, DatasetDict
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    subjects = {}
    for file in sorted(folder.glob("mmlu_*.yaml")):
        definition = load_yaml(file)
        subjects[definition["dataset_name"]] = definition["task"]
    assert len(subjects) == 57

    def rows(subject: str, split: str) -> list[dict[str, Any]]:
        return [
            {"question": f" {subject} {split} {n}: नमस्ते? ", "choices": [f"{n}{c}" for c in "wxyz"], "answer": n % 4,
             "subject": subject}
            for n in range(3)
        ]  # fmt: skip

    for subject, task in subjects.items():
        (tmp_path / task).mkdir()
        for split in ("test", "dev"):
            lines = (json.dumps(row, ensure_ascii=False) for row in rows(subject, split))
            (tmp_path / task / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")

    def load(path: str, name: str, **_: Any) -> Any:
        assert path == "cais/mmlu"
        return DatasetDict({split: Dataset.from_list(rows(name, split)) for split in ("test", "dev")})

    expected, found = theirs(["mmlu"], load, monkeypatch), ours(["mmlu"], tmp_path, monkeypatch)
    assert Counter(task for _, task, _, _ in expected) == dict.fromkeys(subjects.values(), 12)
    assert found == expected
