"""The downstream tasks by name, and the local file that stands for each split. Knows nothing of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resafe.errors import InputError
from resafe.files import split_names

XCOPA = ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")
"""Languages of XCOPA in lm-eval."""


@dataclass(frozen=True)
class UtilityTask:
    """A task of lm-eval that has files of its own in a data directory.

    Attributes:
        name: lm-eval's name.
        title: For people.
        yaml: Its definition, relative to lm-eval's `tasks` folder.
        files: Split → file, relative to the data directory.
        labels: Words of a text label in the files, in the order of lm-eval's numbers; empty where labels are numbers.
    """

    name: str
    title: str
    yaml: str
    files: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def _xcopa(language: str) -> UtilityTask:
    files = {"validation": f"xcopa/val.{language}.jsonl", "test": f"xcopa/test.{language}.jsonl"}
    return UtilityTask(f"xcopa_{language}", f"XCOPA ({language})", f"xcopa/default_{language}.yaml", files)


TASKS: Mapping[str, UtilityTask] = {
    task.name: task
    for task in (
        UtilityTask(
            "copa", "COPA (English)", "super_glue/copa/default.yaml", {"validation": "copa/copa_superglue_val100.jsonl"}
        ),
        *(_xcopa(language) for language in XCOPA),
        *(
            UtilityTask(
                f"xnli_{language}",
                f"XNLI ({language})",
                f"xnli/xnli_{language}.yaml",
                {"validation": f"xnli_hi/xnli_dev_{language}.jsonl"},
                ("entailment", "neutral", "contradiction"),
            )
            for language in ("hi", "en")
        ),
        UtilityTask("gsm8k", "GSM8K", "gsm8k/gsm8k.yaml", {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}),
        UtilityTask("humaneval", "HumanEval", "humaneval/humaneval.yaml", {"test": "humaneval/HumanEval.jsonl"}),
    )
}
"""Tasks that are read from files without any network; every other task of lm-eval works by its name."""

_SHORT = {"xcopa": [f"xcopa_{language}" for language in XCOPA], "xcopa-zh": ["xcopa_zh"], "xnli-hi": ["xnli_hi"]}


def task_names(names: Sequence[str]) -> list[str]:
    """Names as given, split at commas; "xcopa" stands for all its languages. No name twice."""
    spread = [real for name in split_names(names) for real in _SHORT.get(name, [name])]
    return list(dict.fromkeys(spread))


def local_file(data_dir: Path, task: str, split: str) -> Path:
    """Where a split of a task lies: the known tasks' files, else `<data-dir>/<task>/<split>.jsonl`."""
    known = TASKS.get(task)
    general = data_dir / task / f"{split}.jsonl"
    if known and split in known.files and not general.is_file():
        return data_dir / known.files[split]
    return general


def check_request(names: Sequence[str], limit: int | Mapping[str, int] | None, fewshot: int | None = None) -> None:
    """Raises InputError where nothing is asked for, or a number of items or of worked examples makes no sense."""
    if not names:
        raise InputError("no tasks", "name at least one, for example: --tasks copa,xcopa_zh")
    if isinstance(limit, Mapping) and (unasked := sorted(set(limit) - set(names))):
        raise InputError(f"a limit for {', '.join(unasked)}, which is not measured", "name it in --tasks")
    counts = limit.values() if isinstance(limit, Mapping) else [limit]
    if any(count is not None and count < 1 for count in counts):
        raise InputError("a limit below 1", "give a number of items, at least 1")
    if fewshot is not None and fewshot < 0:
        raise InputError(f"{fewshot} worked examples", "give 0 or more, or leave --fewshot out")


def check_tasks(names: Sequence[str], data_dir: Path | None, allow_code: bool, unconfined: bool = False) -> None:
    """What can be said of the known tasks before a model is loaded.

    Args:
        names: lm-eval's names.
        data_dir: Directory of local files.
        allow_code: Programs that the model writes may run, in a sandbox.
        unconfined: They may also run where the kernel cannot shut them in.

    Raises:
        InputError: A file is missing, or programs would run without leave.
        ResafeError: Programs cannot be shut in here.
    """
    if unconfined and not allow_code:
        raise InputError(
            "--allow-unconfined-code says only how programs may run", "to let them run, add --allow-code-execution"
        )
    if "humaneval" in names and not allow_code:
        raise unsafe("humaneval")
    if allow_code:
        from resafe.evals.utility.code import Sandbox

        Sandbox(unconfined=unconfined)
    if data_dir is None:
        return
    for task in (TASKS[name] for name in names if name in TASKS):
        for split in task.files:
            measured = split == ("test" if "test" in task.files else "validation")
            if measured and not (path := local_file(data_dir, task.name, split)).is_file():
                raise InputError(f"{path}: not there, and task {task.name} measures its {split} split", LAYOUT)


LAYOUT = "put the rows there as JSON lines with the Hub's columns, or leave --data-dir out, with a network"


def unsafe(name: str) -> InputError:
    """The error of a task that runs programs without leave."""
    return InputError(f"{name} runs programs that the model writes", "allow it, in a sandbox: --allow-code-execution")
