"""Public sets through Inspect, by the names that `inspect eval` uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai.model import get_model

from resafe.errors import InputError
from resafe.evals import _registry  # noqa: F401  (what the entry point loads)
from resafe.evals.public_tasks import PUBLIC_TASKS, TASKS, public_task


def test_a_task_by_its_name(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "catqa").mkdir()
    rows = [{"category": "c", "subcategory": s, "prompt": f"w1 {s}"} for s in ("w2", "w3")]
    (tmp_path / "catqa" / "catqa_english.jsonl").write_text("\n".join(map(json.dumps, rows)))
    served = get_model("resafe/any", loaded=model, tokenizer=tokenizer, memoize=False)
    (log,) = inspect_eval(
        "resafe/catqa", task_args={"data_dir": str(tmp_path), "max_new_tokens": 2}, model=served,
        log_dir=str(tmp_path / "logs"), display="none",
    )  # fmt: skip
    assert log.status == "success"
    assert [(s.input, s.metadata["topic"], s.metadata["side"]) for s in sorted(log.samples, key=lambda s: s.input)] == [
        ("w1 w2", "c/w2", "harmful"),
        ("w1 w3", "c/w3", "harmful"),
    ]
    assert log.results.scores[0].metrics["mean"].value == 0.0


def test_sides_are_those_of_the_sets(tmp_path: Path) -> None:
    assert set(TASKS) == set(PUBLIC_TASKS)
    assert {name for name, side in PUBLIC_TASKS.items() if side == "harmless"} == {
        "oktest", "or_bench", "or_bench_published", "xstest_safe",
    }  # fmt: skip
    with pytest.raises(InputError, match="there is no directory"):
        public_task("catqa", "harmful", str(tmp_path / "no"), None, 2)
