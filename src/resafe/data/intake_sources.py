"""Training data by reference: a registered set, a file, an entry of LLaMA-Factory's `dataset_info.json`, a Hub id.

Everything is read as a stream; `load_training` collects, `stream_training` does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe.data.formats import Layout, example_of, pair_of
from resafe.data.intake import IntakeReport, Parse, take_in
from resafe.data.items import Example, Pair
from resafe.data.llamafactory import INFO, Entry, read_entry
from resafe.data.pairs import preference_pair
from resafe.data.registry import DataSource, datasets
from resafe.data.sources import Row
from resafe.data.streams import STREAMED, stream_file, stream_hub
from resafe.errors import InputError
from resafe.registry import nearest

MAX_BAD_SHARE = 0.01
"""Share of rows that may be unusable before a run stops, unless another is stated."""


@dataclass(frozen=True)
class TrainingData:
    """What was loaded, and what became of the rows."""

    items: tuple[Example | Pair, ...]
    report: IntakeReport

    @property
    def examples(self) -> list[Example]:
        """The items, of a set of examples."""
        return [item for item in self.items if isinstance(item, Example)]

    @property
    def pairs(self) -> list[Pair]:
        """The items, of a set of pairs."""
        return [item for item in self.items if isinstance(item, Pair)]


def load_training(
    reference: str,
    kind: str,
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> TrainingData:
    """Loads training data.

    Args:
        reference: A registered name (`resafe ls data`), the path of a .jsonl, .json, .csv or .parquet file or of a
            folder of them, "DIR/dataset_info.json:NAME" for an entry of LLaMA-Factory's file, or a Hub id "org/name",
            also with ":split" or ":config:split".
        kind: "examples" or "pairs".
        data_dir: Directory with the files of registered sets; None takes them from the Hub.
        limit: Use only the first so many items.
        max_bad_share: The share of rows that may be unusable.

    Raises:
        InputError: There is no such source, it is of the other kind, or too many of its rows are bad; names their
            lines and reasons.
    """
    report = IntakeReport(reference, keep_places=True)
    items = tuple(itertools.islice(stream_training(reference, kind, data_dir=data_dir, report=report), limit))
    report.check(max_bad_share)
    return TrainingData(items, report)


def stream_training(
    reference: str, kind: str, *, data_dir: Path | None = None, report: IntakeReport | None = None
) -> Iterator[Example | Pair]:
    """As `load_training`, one item at a time and without a check: call `report.check` at the end.

    Memory: one row, and the ids of the items so far; only a .json list is read whole.
    """
    if kind not in ("examples", "pairs"):
        raise InputError(f"no kind {kind!r} of training data", "the kinds are: examples, pairs")
    rows, parse = _source(reference, kind, data_dir)
    return take_in(rows, parse, report or IntakeReport(reference))


def _source(reference: str, kind: str, data_dir: Path | None) -> tuple[Iterator[Any], Parse]:
    path, sign, entry = reference.rpartition(":")
    if sign and Path(path).name == INFO:
        return _from_entry(read_entry(Path(path), entry), kind)
    if reference.endswith(INFO):
        raise InputError(f"{reference}: which entry?", f"write {reference}:NAME")
    if reference.endswith(STREAMED):
        return stream_file(Path(reference)), _parser(kind, Path(reference).stem, Layout())
    registered = _registered(reference, kind)
    if registered is not None:
        return _from_registry(registered, kind, data_dir), registered.parse  # type: ignore[return-value]
    if Path(reference).is_dir():
        return stream_file(Path(reference)), _parser(kind, Path(reference).name, Layout())
    if "/" in reference and not Path(reference).exists():
        dataset, *rest = reference.split(":")
        config, split = (rest[0] if len(rest) > 1 else None), (rest[-1] if rest else "train")
        return stream_hub(dataset, config, split), _parser(kind, dataset.rpartition("/")[2], Layout())
    names = [source.name for source in datasets if source.kind == kind]
    raise InputError(
        f"there is no training data '{reference}'",
        f"{nearest(reference, names)}; or give a file ({', '.join(STREAMED)}), DIR/{INFO}:NAME, or a Hub id",
    )


def _registered(reference: str, kind: str) -> DataSource | None:
    sources = list(datasets)
    for name in (reference, f"{reference}_train"):  # "gsm8k" names the questions; its training part has another name
        found = next((s for s in sources if s.kind == kind and (s.name == name or s.hub == name)), None)
        if found is not None:
            return found
    other = next((source for source in sources if source.name == reference), None)
    if other is not None:
        raise InputError(f"the set '{reference}' holds {other.kind}, not {kind}", f"name a set of {kind}")
    return None


def _from_registry(source: DataSource, kind: str, data_dir: Path | None) -> Iterator[Any]:
    if data_dir is not None and source.file:
        return stream_file(data_dir / source.file)
    if data_dir is not None:
        raise InputError(f"the set '{source.name}' is on the Hub only ({source.hub})", "leave out --data-dir")
    if source.hub is None:
        raise InputError(f"the set '{source.name}' is not on the Hub", "give the directory of its file by --data-dir")
    return stream_hub(source.hub, source.config, source.split)


def _from_entry(entry: Entry, kind: str) -> tuple[Iterator[Any], Parse]:
    if entry.ranking != (kind == "pairs"):
        held = "pairs (ranking is true)" if entry.ranking else "examples (ranking is not true)"
        raise InputError(f"the entry '{entry.name}' holds {held}, not {kind}", "name another entry")
    rows: Iterator[Any]
    if entry.file is not None:
        rows = stream_file(entry.file)
    else:
        rows = stream_hub(str(entry.hub), entry.subset, entry.split, entry.revision, data_dir=entry.folder)
    return itertools.islice(rows, entry.limit), _parser(kind, entry.name, entry.layout)


def _parser(kind: str, name: str, layout: Layout) -> Parse:
    def pair(row: Row) -> Pair | None:
        raw = {"response_0", "response_1", "is_response_0_safe", "is_response_1_safe"}
        return preference_pair(row) if raw <= set(row.values) else pair_of(row.values, name, layout)

    return pair if kind == "pairs" else lambda row: example_of(row.values, name, layout)
