"""The stage that measures usefulness: tasks of lm-eval on one model of a recipe, items as records."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resafe.checkpoints import Checkpoint
from resafe.evals.utility import evaluate_utility, task_names
from resafe.evals.utility.names import TASKS, local_file
from resafe.evals.utility.results import write_utility
from resafe.recipe.context import Context
from resafe.recipe.schema import UtilityPart
from resafe.recipe.stage import Stage


def measure_utility(context: Context, name: str, stage: Stage, checkpoint: Checkpoint) -> Stage | None:
    """Measures one model; its directory gets `records.jsonl` and `utility.json`. None if the recipe names no tasks.

    Args:
        context: The run.
        name: The model's name in all tables.
        stage: The stage that made the model.
        checkpoint: The model.
    """
    part, data_dir = context.recipe.utility, context.recipe.data.data_dir
    if part is None:
        return None

    def work(path: Path) -> dict[str, Any]:
        bar = context.reporter.bar(f"utility: {name}", "requests")
        result = evaluate_utility(
            name,
            context.load(checkpoint),
            context.tokenizer,
            part.tasks,
            data_dir=data_dir,
            limit=part.limit,
            fewshot=part.fewshot,
            chat=part.chat,
            system=context.system if part.chat else None,
            max_new_tokens=part.max_new_tokens,
            batch_size=part.batch_size,
            allow_code_execution=context.allow_code_execution,
            allow_unconfined_code=context.allow_unconfined_code,
            progress=lambda done, total: bar(done, total, {}),
        )
        write_utility(path, [result])
        return {"code": dict(result.code)} if result.code else {}

    depends = {
        "stage": stage.digest,
        "utility": part.model_dump(mode="json", exclude={"batch_size"}),
        "system": context.system if part.chat else None,
        "rows": _rows_digest(part, data_dir),
        "lm_eval": version("lm_eval"),
        "dtype": context.dtype,
    }
    return context.run.stage(f"utility-{name}", depends, work)


def _rows_digest(part: UtilityPart, data_dir: Path | None) -> dict[str, str]:
    """SHA-256 of the local files that the tasks are read from; of rows on the Hub nothing is known beforehand."""
    if data_dir is None:
        return {}
    found = {}
    for task in task_names(part.tasks):
        splits = TASKS[task].files if task in TASKS else ("test", "validation", "train", "dev")
        for split in splits:
            file = local_file(data_dir, task, split)
            if file.is_file():
                found[f"{task}/{split}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found
