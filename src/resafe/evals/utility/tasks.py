"""Task objects of lm-eval: from its own definitions, with rows from the Hub or from local files.

A definition is lm-eval's YAML with its own prompt functions; with a data directory only the loading of rows is
replaced, so prompts cannot differ. Tasks that run programs load the metric `code_eval` from the Hub when their module
is imported: that one call gets our sandbox in its place, with or without a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resafe.errors import InputError
from resafe.evals.utility.names import TASKS, local_file

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

    direct = [name for name in names if name in TASKS]
    others = [name for name in names if name not in TASKS]
    manager = TaskManager(include_defaults=bool(others))  # reading all definitions takes seconds
    with _code_metric(code):
        found: list[Any] = [_build(_definition(name), data_dir) for name in direct]
        for name in others:
            found += _by_name(manager, name, data_dir)
        loaded: dict[str, Any] = dict(manager.load(found))
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and code is None:
            raise _unsafe(name)
        own = task.get_config("num_fewshot")
        if fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _definition(name: str) -> dict[str, Any]:
    """lm-eval's own definition of a task that we have files for, with its functions."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    config: dict[str, Any] = load_yaml(root / TASKS[name].yaml)
    return config


def _build(config: dict[str, Any], data_dir: Path | None) -> Any:
    from lm_eval.api.task import ConfigurableTask

    plain = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}
    if data_dir is not None:
        plain["custom_dataset"] = _LocalRows(plain, data_dir)
    try:
        return ConfigurableTask(config=plain)
    except (OSError, ConnectionError) as error:
        raise _unreachable(plain["task"], error) from error


def _by_name(manager: Any, name: str, data_dir: Path | None) -> list[Any]:
    """Tasks, a group or a tag of lm-eval; with a data directory each is built anew with local rows."""
    from lm_eval.tasks._yaml_loader import load_yaml

    known = manager.task_index
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, list(known), n=3)
        raise InputError(
            f"lm-eval has no task {name!r}",
            f"did you mean {', '.join(near)}?" if near else "see all names: lm_eval ls tasks",
        )
    if data_dir is None:
        try:
            return list(manager.load([name])["tasks"].values())
        except (OSError, ConnectionError) as error:
            raise _unreachable(name, error) from error
    tasks = []
    for leaf in _leaves(known, name):
        config = load_yaml(known[leaf].yaml_path)
        if "class" in config:
            raise InputError(f"{leaf}: this task loads its rows in its own way", "leave --data-dir out, with a network")
        tasks.append(_build({**config, "task": leaf}, data_dir))
    return tasks


def _leaves(known: Any, name: str) -> list[str]:
    """The tasks under a name, which may be a group or a tag."""
    entry = known[name]
    members: list[Any] = sorted(entry.tags) if entry.kind.name == "TAG" else []
    if entry.kind.name == "GROUP":
        from lm_eval.tasks._yaml_loader import load_yaml

        members = load_yaml(entry.yaml_path, resolve_func=False).get("task", [])
        members = [members] if isinstance(members, str) else members
        members = [item if isinstance(item, str) else item.get("task", item.get("group")) for item in members]
    if not members:
        return [name]
    return [leaf for member in members if member in known for leaf in _leaves(known, member)]


class _LocalRows:
    """Loads the splits that a task's definition names from local files; lm-eval calls it as its `custom_dataset`."""

    def __init__(self, config: dict[str, Any], data_dir: Path) -> None:
        self.task, self.data_dir = str(config["task"]), data_dir
        kinds = ("test_split", "validation_split", "fewshot_split", "training_split")
        named = [str(config[kind]) for kind in kinds if config.get(kind)]
        self.wanted, self.needed = set(named), set(named[:1])  # the first is the one that is measured

    def __call__(self, **_: Any) -> dict[str, Any]:
        from datasets import Dataset

        splits = {}
        for split in sorted(self.wanted):
            path = local_file(self.data_dir, self.task, split)
            if path.is_file():
                splits[split] = Dataset.from_list(_rows(path, self.task))
            elif split in self.needed:
                raise InputError(f"{path}: not there, and task {self.task} measures its {split} split", _LAYOUT)
        first = next(iter(splits.values()))
        for split in self.wanted - set(splits):  # named by the definition, and not needed unless examples come from it
            splits[split] = first.select([])
        return splits

    def __deepcopy__(self, _: Any) -> _LocalRows:
        return self


_LAYOUT = "put the rows there as JSON lines with the Hub's columns, or leave --data-dir out, with a network"


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
            raise InputError(f"{path}:{number}: not a row of {task} ({error})", _LAYOUT) from error
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows", _LAYOUT)
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
            if name.startswith("lm_eval.tasks.") and isinstance(getattr(module, "compute_", None), _OURS):
                module.compute_ = code if code is not None else _Refuses()  # type: ignore[attr-defined]
    finally:
        evaluate.load = original


class CodeMetric:
    """What stands for `code_eval`, so that it can be told from the Hub's."""

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        """(pass@k by name, results by candidate), as `code_eval` returns them."""
        raise NotImplementedError


class _Refuses(CodeMetric):
    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        if references == ["assert add(2, 3)==5"]:  # the trial call that lm-eval's module makes at its import
            return {f"pass@{n}": 0.0 for n in k}, {}
        raise _unsafe("the task")


_OURS = (CodeMetric,)


def _unsafe(name: str) -> InputError:
    return InputError(f"{name} runs programs that the model writes", "allow it, in a sandbox: --allow-code-execution")


def _unreachable(name: str, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(
        f"the rows of {name} cannot be loaded from the Hub ({reason})", "give local files: --data-dir DIRECTORY"
    )
