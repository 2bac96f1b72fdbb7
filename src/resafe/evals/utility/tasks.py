"""Task objects of lm-eval: from its own definitions, with rows from the Hub or from local files.

A definition is lm-eval's YAML with its own prompt functions; with a data directory only the loading of rows is
replaced, so prompts cannot differ. Tasks that run programs load the metric `code_eval` from the Hub when their module
is imported: that one call gets our sandbox in its place, with or without a network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resafe.errors import InputError
from resafe.evals.utility.names import LAYOUT, TASKS, local_file, unsafe

FEWSHOT_SEED = 1234
"""lm-eval's default."""


def load_tasks(
    names: Sequence[str], *, data_dir: Path | None = None, fewshot: int | None = None, code: Any = None
) -> dict[str, Any]:
    """Builds lm-eval's tasks.

    Args:
        names: Names of lm-eval: tasks, groups (mmlu) or tags.
        data_dir: Directory of local files, `names.local_file`; None loads from the Hub.
        fewshot: Worked examples in each prompt; None is each task's own number. As in lm-eval, a task that fixes 0
            keeps it.
        code: Stands for the metric `code_eval`: has `compute(references, predictions, k)`. None refuses such tasks.

    Returns:
        lm-eval's `tasks` and `groups`, as its `evaluate` takes them.

    Raises:
        InputError: An unknown task, a missing or damaged file, or programs without leave to run.
    """
    from lm_eval.tasks import TaskManager

    others = [name for name in names if name not in TASKS]
    manager = TaskManager(include_defaults=bool(others))  # reading all definitions takes seconds
    _check_known(others, manager)
    with _code_metric(code), _local_rows(data_dir):
        try:
            found: list[Any] = [_build(_definition(name)) if name in TASKS else name for name in names]
            loaded: dict[str, Any] = dict(manager.load(found))
        except (OSError, ConnectionError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the rows of {', '.join(names)} cannot be loaded from the Hub ({reason})",
                "give local files: --data-dir DIRECTORY",
            ) from error
    for name, task in loaded["tasks"].items():
        if _runs_outside(task):
            raise outside(name)
        if getattr(task, "UNSAFE_CODE", False):
            _check_code(name, task, code)
        own = task.get_config("num_fewshot")
        if fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        if data_dir is not None and task.get_config("num_fewshot") and not len(task.fewshot_docs() or ()):
            split = task.get_config("fewshot_split") or task.get_config("training_split")
            raise InputError(
                f"{local_file(data_dir, name, str(split))}: missing; {name} takes its worked examples from it",
                "put the rows there, or ask for none: --fewshot 0",
            )
        if fewshot and task.get_config("num_fewshot"):
            own_split = task.get_config("fewshot_split") in (None, task.get_config("test_split"))
            there = len(task.fewshot_docs() or ()) - own_split  # an item is no example for itself
            if fewshot > there:
                raise InputError(f"{name} has {there} worked examples, {fewshot} are too many", "lower --fewshot")
    return loaded


def check_known(names: Sequence[str]) -> None:
    """Raises InputError for a name that lm-eval does not know; reads its index only where a name needs it."""
    from lm_eval.tasks import TaskManager

    if others := [name for name in names if name not in TASKS]:
        _check_known(others, TaskManager())


def _definition(name: str) -> dict[str, Any]:
    """lm-eval's own definition of a task that we have files for, with its functions."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    config: dict[str, Any] = load_yaml(root / TASKS[name].yaml)
    return config


def _build(config: dict[str, Any]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config={key: value for key, value in config.items() if key not in ("tag", "group")})


def _check_known(names: Sequence[str], manager: Any) -> None:
    import difflib

    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, sorted({*manager.task_index, *TASKS}), n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "see all names: lm_eval ls tasks"
            raise InputError(f"lm-eval has no task {name!r}", hint)


@contextmanager
def _local_rows(data_dir: Path | None) -> Iterator[None]:
    """In it, lm-eval's tasks (also those of a group) take their rows from local files; None changes nothing."""
    from lm_eval.api.task import ConfigurableTask

    if data_dir is None:
        yield
        return
    original = ConfigurableTask.download

    def download(self: Any, *_: Any, **__: Any) -> None:
        self.dataset = _splits(self.config, data_dir)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def _splits(config: Any, data_dir: Path) -> dict[str, Any]:
    """The splits that a task's definition names, each a `datasets.Dataset`."""
    from datasets import Dataset

    shots = config.fewshot_config
    named = [config.test_split, config.validation_split, getattr(shots, "split", None), config.fewshot_split]
    wanted = list(dict.fromkeys(split for split in [*named, config.training_split] if split))
    splits = {}
    for place, split in enumerate(wanted):
        path = local_file(data_dir, str(config.task), split)
        if path.is_file():
            splits[split] = Dataset.from_list(_rows(path, str(config.task)))
        elif place == 0:  # the first is the one that is measured
            raise InputError(f"{path}: not there, and task {config.task} measures its {split} split", LAYOUT)
    first = splits[wanted[0]]
    # A split that is named and not there matters only where examples come from it: then there are none to take.
    return {split: splits.get(split, first.select([])) for split in wanted}


def _rows(path: Path, task: str) -> list[dict[str, Any]]:
    """The file's rows, in UTF-8; text labels become lm-eval's numbers."""
    labels = TASKS[task].labels if task in TASKS else ()
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if labels and isinstance(row["label"], str):
                row["label"] = labels.index(row["label"])
        except (json.JSONDecodeError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a row of {task} ({error})", LAYOUT) from error
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows", LAYOUT)
    return rows


@contextmanager
def _code_metric(code: Any) -> Iterator[None]:
    """In it, `evaluate.load("code_eval")` gives `code`; modules that were imported before get it as well."""
    import sys

    import evaluate

    original = evaluate.load

    def load(path: str, *args: Any, **settings: Any) -> Any:
        if path == "code_eval":
            return code if code is not None else _Refuses()
        return original(path, *args, **settings)

    evaluate.load = load
    try:
        yield
        for name, module in list(sys.modules.items()):
            if not name.startswith("lm_eval.tasks."):
                continue
            for attribute in [key for key, value in vars(module).items() if isinstance(value, CodeMetric)]:
                setattr(module, attribute, code if code is not None else _Refuses())
    finally:
        evaluate.load = original


class CodeMetric:
    """What stands for `code_eval`, so that it can be told from the Hub's."""

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        """(pass@k by name, results by candidate), as `code_eval` returns them."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Raises ResafeError where programs cannot be run."""


_OUTSIDE = ("/tasks/score/math/", "/tasks/noreval/ask_gec/")
"""Code of lm-eval that evaluates answers (sympy's parse_expr) or hands them to a shell, without saying so."""


def _runs_outside(task: Any) -> bool:
    """Whether a function that scores the task is among those that run answers in this process or a shell."""
    functions = [*vars(task.config).values(), *task._metric_fn_list.values()]
    codes = [getattr(getattr(one, "__self__", one), "__code__", None) for one in functions]
    files = {code.co_filename.replace(os.sep, "/") for code in codes if code is not None}
    return any(mark in file for file in files for mark in _OUTSIDE)


def outside(name: str) -> InputError:
    """The error of a task whose own code would run what a model wrote."""
    return InputError(
        f"{name} runs programs with code of its own, outside any sandbox", "leave it out; humaneval and mbpp work"
    )


def _check_code(name: str, task: Any, code: CodeMetric | None) -> None:
    """Refuses a task that runs programs where they may not run, or whose own code would run them (CRUXEval)."""
    if code is None:
        raise unsafe(name)
    called = task._metric_fn_list.values()  # lm-eval keeps a function's `__call__`; None: the task scores by itself
    scopes = [getattr(getattr(metric, "__self__", metric), "__globals__", {}) for metric in called]
    if not any(isinstance(value, CodeMetric) for scope in scopes for value in scope.values()):
        raise outside(name)
    code.prepare()


class _Refuses(CodeMetric):
    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        if references == ["assert add(2, 3)==5"]:  # the trial call that lm-eval's module makes at its import
            return {f"pass@{n}": 0.0 for n in k}, {}
        raise unsafe("the task")
