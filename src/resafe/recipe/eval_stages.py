"""The stages that evaluate: each model on the same questions, with perplexity as the coherence check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resafe.checkpoints import Checkpoint
from resafe.evals import evaluate_model, perplexity
from resafe.evals.records import Record
from resafe.evals.refusal import rules_digest
from resafe.evals.responses import ResponseStore
from resafe.provenance import digest_value
from resafe.recipe.context import Context
from resafe.recipe.stage import Stage
from resafe.report import read_records, write_records


def evaluate(context: Context, name: str, stage: Stage, checkpoint: Checkpoint, tasks: tuple[str, ...]) -> Stage:
    """Evaluates one model; its directory gets `records.jsonl` and Inspect's logs.

    Args:
        context: The run.
        name: The model's name in all tables.
        stage: The stage that made the model.
        checkpoint: The model.
        tasks: Names in `tune` whose tasks it is measured on.
    """
    sets = context.question_sets(tasks)

    def work(path: Path) -> dict[str, Any]:
        model = context.load(checkpoint)
        bar = context.reporter.bar(f"evaluate: {name}", "answers")
        with ResponseStore(path / "work", stage.digest) as store:  # what a killed attempt answered lasts
            records = evaluate_model(
                name=name,
                model=model,
                tokenizer=context.tokenizer,
                sets=sets,
                system=context.system,
                log_dir=path / "logs",
                batch_size=context.recipe.questions.batch_size,
                store=store,
                progress=lambda done, total: bar(done, total, {}),
            )
        write_records(path / "records.jsonl", records)
        return {"perplexity": perplexity(model, context.tokenizer, context.texts()).value}

    asked = {
        key: [questions.scoring, questions.max_new_tokens, [(q.id, q.prompt, q.target) for q in questions.questions]]
        for key, questions in sets.items()
    }
    depends = {"stage": stage.digest, "sets": digest_value(asked), "texts": digest_value(context.texts())}
    depends |= {"dtype": context.dtype, "rules": rules_digest()}
    return context.run.stage(f"evaluate-{name}", depends, work)


def records_of(stage: Stage) -> list[Record]:
    """The records of a finished evaluation."""
    return read_records(stage.path / "records.jsonl")
