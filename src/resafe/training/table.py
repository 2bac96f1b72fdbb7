"""Token rows on disk, for sets larger than memory: written once as a stream, then mapped into memory. Knows no models.

The table has every row's tokens and labels at hand by its number, so that a run over it goes through the same batches
as a run over rows in memory, and ends with the same weights. In memory are the rows' lengths and their order.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resafe.training.work import TOKENS, make_work

TokenRow = dict[str, list[int]]
"""`input_ids` and `labels`, of equal length."""

_TOGETHER = 256  # rows of a record batch


@dataclass
class RowsDigest:
    """SHA-256 over rows, one at a time; the same for rows in memory and on disk."""

    _hasher: Any = field(default_factory=hashlib.sha256)

    def add(self, row: TokenRow) -> None:
        """Takes the next row."""
        for key in sorted(row):
            self._hasher.update(f"{key} {len(row[key])};".encode() + array("q", row[key]).tobytes())

    def value(self) -> str:
        """The digest so far, 64 hex digits."""
        return str(self._hasher.hexdigest())


def rows_digest(rows: Iterable[TokenRow]) -> str:
    """The digest of all rows."""
    digest = RowsDigest()
    for row in rows:
        digest.add(row)
    return digest.value()


@dataclass(frozen=True)
class TokenTable:
    """Rows on disk.

    Attributes:
        path: The Arrow file.
        count: Rows.
        dropped: Examples of which no answer was left.
        digest: Of the rows.
    """

    path: Path
    count: int
    dropped: int
    digest: str

    def dataset(self) -> Any:
        """The rows as a `datasets.Dataset`, mapped into memory."""
        from datasets import Dataset

        return Dataset.from_file(str(self.path))

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        import pyarrow.compute as compute  # type: ignore[import-untyped,unused-ignore]

        column = self.dataset().data.column("input_ids")
        return [int(size) for chunk in column.chunks for size in compute.list_value_length(chunk).to_pylist()]


def write_table(rows: Iterable[TokenRow | None], work: Path) -> TokenTable:
    """Writes rows into a working directory as they come; None counts as a dropped example.

    Memory: some hundred rows.
    """
    import pyarrow as arrow  # type: ignore[import-untyped,unused-ignore]

    make_work(work)
    target, record = (work / name for name in TOKENS)
    record.unlink(missing_ok=True)
    numbers = arrow.list_(arrow.int32())
    schema = arrow.schema([("input_ids", numbers), ("labels", numbers)])
    digest, count, dropped, waiting = RowsDigest(), 0, 0, []
    with arrow.OSFile(str(target), "wb") as sink, arrow.ipc.new_stream(sink, schema) as writer:
        for row in rows:
            if row is None:
                dropped += 1
                continue
            digest.add(row)
            count += 1
            waiting.append(row)
            if len(waiting) == _TOGETHER:
                writer.write_batch(arrow.RecordBatch.from_pylist(waiting, schema=schema))
                waiting = []
        if waiting:
            writer.write_batch(arrow.RecordBatch.from_pylist(waiting, schema=schema))
    table = TokenTable(target, count, dropped, digest.value())
    facts = {"count": count, "dropped": dropped, "digest": table.digest}
    record.write_text(json.dumps(facts), encoding="utf-8")
    return table


def read_table(work: Path) -> TokenTable:
    """The table that another process of this run wrote."""
    target, record = (work / name for name in TOKENS)
    return TokenTable(target, **json.loads(record.read_text(encoding="utf-8")))
