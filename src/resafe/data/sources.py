"""Rows from where they lie: a file (JSONL, JSON, CSV) or the Hub. Every row remembers its place, for error messages.

Knows formats and places; knows no data set by name.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resafe.errors import InputError

FORMATS = (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Row:
    """One row of a set.

    Attributes:
        values: The columns.
        place: Where the row is, for messages: "file.jsonl, line 12".
        rename: Column names that the data uses for the names that a parser asks for.
    """

    values: Mapping[str, Any]
    place: str
    rename: Mapping[str, str] = field(default_factory=dict)

    def has(self, column: str) -> bool:
        """Whether the row has the column."""
        return self.rename.get(column, column) in self.values

    def value(self, *names: str) -> Any:
        """The value of the first of these columns that the row has.

        Raises:
            InputError: It has none of them; names the row's place and the nearest column.
        """
        wanted = [self.rename.get(name, name) for name in names]
        for name in wanted:
            if name in self.values:
                return self.values[name]
        near = difflib.get_close_matches(wanted[0], [str(key) for key in self.values], n=1, cutoff=0.4)
        columns = ", ".join(str(key) for key in self.values)
        raise InputError(
            f"{self.place}: there is no column '{wanted[0]}'",
            (f"did you mean '{near[0]}'? " if near else "") + f"its columns are: {columns}",
        )

    def text(self, *names: str) -> str:
        """Like `value`, for text without surrounding space.

        Raises:
            InputError: The column is missing, or holds no text.
        """
        value = self.value(*names)
        name = self.rename.get(names[0], names[0])
        if not isinstance(value, str):
            raise InputError(f"{self.place}: column '{name}' holds {type(value).__name__}, not text", "")
        if not value.strip():
            raise InputError(f"{self.place}: column '{name}' is empty", "remove the row or fill it")
        return value.strip()

    def flag(self, *names: str) -> bool:
        """Like `value`, for true and false, also as 0/1 and as text.

        Raises:
            InputError: The column is missing or holds something else.
        """
        value = self.value(*names)
        known = {"true": True, "false": False, "1": True, "0": False}
        if str(value).lower() not in known:
            name = self.rename.get(names[0], names[0])
            raise InputError(f"{self.place}: column '{name}' is {value!r}", "it must be true or false")
        return known[str(value).lower()]


def read_file(path: Path, rename: Mapping[str, str] | None = None) -> list[Row]:
    """Reads a JSONL file, a JSON file that holds a list of objects, or a CSV file with a header.

    Args:
        path: The file; its ending names the format.
        rename: For each column that a parser asks for, the name it has in this file; others keep theirs.

    Returns:
        Its rows, at least one.

    Raises:
        InputError: No such file (the nearest name is given), unknown format, not UTF-8, bad JSON (with its line), a
            row that is not an object, or no rows at all.
    """
    if not path.is_file():
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.4)
        raise InputError(f"there is no file {path}", f"did you mean '{near[0]}'?" if near else "check the path")
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: the format '{path.suffix}' is not known", f"give one of {', '.join(FORMATS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8", "save the file as UTF-8") from None
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[path.suffix]
    rows = [Row(values, place, rename or {}) for values, place in reader(text, path)]
    if not rows:
        raise InputError(f"{path} holds no rows", "give a file with data")
    return rows


def _loads(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        why = f"{path.name}, line {line}: bad JSON ({error.msg}, column {error.colno})"
        raise InputError(why, f"mend that line of {path}") from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{place}: a row must be a JSON object, this is a {type(value).__name__}", "")
    return value


def _jsonl(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    # split on "\n" alone: str.splitlines also breaks at U+2028, which JSON strings may hold
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path.name}, line {number}"
            yield _object(_loads(line, path, number), place), place


def _json(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    content = _loads(text, path, 1) if text.strip() else []
    if not isinstance(content, list):
        raise InputError(f"{path}: a .json file must hold a list of objects", "use .jsonl for one object a line")
    for number, value in enumerate(content, start=1):
        place = f"{path.name}, row {number}"
        yield _object(value, place), place


def _csv(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for values in reader:
        place = f"{path.name}, line {reader.line_num}"
        if None in values or None in values.values():
            raise InputError(f"{place}: the row has not as many columns as the header", "quote fields that hold commas")
        yield dict(values), place


def read_hub(
    dataset: str, config: str | None, split: str, revision: str | None = None, rename: Mapping[str, str] | None = None
) -> list[Row]:
    """Reads one split of a data set on the Hub.

    Args:
        dataset: Its id, "org/name".
        config: Its configuration; None for the default one.
        split: Its split.
        revision: Branch, tag or commit; None for the newest.
        rename: As for `read_file`.

    Returns:
        Its rows, at least one.

    Raises:
        InputError: The set cannot be had (not there, gated, no network), or is empty.
    """
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        table = load_dataset(dataset, config, split=split, revision=revision)
    except Exception as error:  # the library raises a dozen unrelated types here
        reason = str(error).strip().split("\n")[0]
        if HF_HUB_OFFLINE:
            raise InputError(
                f"cannot load {dataset} (split {split}): HF_HUB_OFFLINE is set and it is not in the local cache",
                "give the files with --data-dir, or load it once where there is a network",
            ) from error
        raise InputError(
            f"cannot load {dataset} (split {split}) from the Hub: {type(error).__name__}: {reason}",
            "check the id and the network, or give the files with --data-dir",
        ) from error
    rows = [Row(dict(values), f"{dataset}, {split} row {number}", rename or {}) for number, values in enumerate(table)]
    if not rows:
        raise InputError(f"{dataset} (split {split}) holds no rows", "name another split")
    return rows
