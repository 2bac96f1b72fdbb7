"""Rows one at a time, for sets larger than memory: JSONL and CSV line by line, Parquet by pages, the Hub by streaming.

A line that cannot be read is a row too (`Unreadable`), so that whoever counts can name it. Knows no formats of rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe.data.sources import FORMATS, Row, read_file
from resafe.errors import InputError


@dataclass(frozen=True)
class Unreadable:
    """A line that holds no row: where it is, and what is wrong with it."""

    place: str
    detail: str


STREAMED = (*FORMATS, ".parquet")
"""Endings of the files that can be streamed."""

_BATCH = 128  # rows of a Parquet file that are decoded at a time


def stream_file(path: Path) -> Iterator[Row | Unreadable]:
    """The rows of a file, in order, or of all files of a folder in the order of their names.

    JSONL and CSV take the memory of one row, Parquet that of some hundred (and of a page); a .json list is read whole.

    Raises:
        InputError: No such file, unknown format, not UTF-8, a .json file that holds no list, or a folder without files
            of one format.
    """
    if path.is_dir():
        for inner in _files(path):
            yield from stream_file(inner)
    elif path.is_file() and path.suffix not in STREAMED:
        raise InputError(f"{path}: the format '{path.suffix}' is not known", f"give one of {', '.join(STREAMED)}")
    elif path.suffix == ".parquet" and path.is_file():
        yield from _parquet(path)
    elif path.suffix == ".json" and path.is_file() and _one_object_a_line(path):
        yield from _jsonl(path)  # many ".json" files are JSONL
    elif path.suffix not in (".jsonl", ".csv") or not path.is_file():
        yield from read_file(path)  # says what is wrong, or reads the list
    elif path.suffix == ".jsonl":
        yield from _jsonl(path)
    else:
        yield from _csv(path)


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in STREAMED)
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1:
        what = f"files of several formats: {', '.join(kinds)}" if kinds else "no data files"
        raise InputError(
            f"the folder {folder} holds {what}",
            f"put files of one format there: {', '.join(STREAMED)}",
        )
    return files


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped,unused-ignore]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path.name}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file that can be read ({error})", "write it anew") from None


def _one_object_a_line(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as stream:
        first = next((line for line in stream if line.strip()), "")
    try:
        return isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        return False


def _jsonl(path: Path) -> Iterator[Row | Unreadable]:
    with path.open("rb") as stream:  # binary: lines end at "\n" alone, and a bad byte costs one line
        for number, raw in enumerate(stream, start=1):
            place = f"{path.name}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                value = json.loads(line)
            except UnicodeDecodeError as error:
                yield Unreadable(place, f"byte {error.start} is not UTF-8")
                continue
            except json.JSONDecodeError as error:
                yield Unreadable(place, f"bad JSON ({error.msg}, column {error.colno})")
                continue
            yield Row(value, place) if isinstance(value, dict) else Unreadable(place, f"a {type(value).__name__}")


def _csv(path: Path) -> Iterator[Row | Unreadable]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            for values in reader:
                place = f"{path.name}, line {reader.line_num}"
                if None in values or None in values.values():
                    yield Unreadable(place, "not as many columns as the header")
                else:
                    yield Row(dict(values), place)
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: byte {error.start} is not UTF-8", "save the file as UTF-8") from None


def stream_hub(
    dataset: str, config: str | None, split: str, revision: str | None = None, *, data_dir: str | None = None
) -> Iterator[Row]:
    """The rows of one split of a set on the Hub, downloaded as they are asked for; offline those of the local cache.

    Args:
        dataset: Its id, "org/name".
        config: Its configuration; None for the default one.
        split: Its split.
        revision: Branch, tag or commit; None for the newest.
        data_dir: A folder inside the set.

    Raises:
        InputError: The set cannot be had.
    """
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_OFFLINE

    place: dict[str, Any] = {"split": split, "revision": revision, "data_dir": data_dir}
    try:
        table: Any = load_dataset(dataset, config, **place, streaming=not HF_HUB_OFFLINE)
        for number, values in enumerate(table):
            yield Row(dict(values), f"{dataset}, {split} row {number}")
    except Exception as error:  # the library raises a dozen unrelated types here
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        if HF_HUB_OFFLINE:
            raise InputError(
                f"cannot load {dataset} (split {split}): HF_HUB_OFFLINE is set and it is not in the local cache",
                f"load it once where there is a network, or give a file ({', '.join(STREAMED)})",
            ) from error
        raise InputError(
            f"cannot stream {dataset} (split {split}) from the Hub: {type(error).__name__}: {reason}",
            f"check the id and the network, or give a file ({', '.join(STREAMED)})",
        ) from error
