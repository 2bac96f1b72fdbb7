"""A stream through a table on disk: the weights and the report of rows in memory, without holding the rows."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from resafe.errors import InputError
from resafe.training.sft import encode_examples
from resafe.training.table import read_table, rows_digest, write_table
from resafe.training.verbs import tune
from resafe.training.work import work_directory

from .test_sft import EXAMPLES
from .test_verbs import CPU, QUICK


def test_a_table_holds_the_rows(tokenizer: Any, tmp_path: Path) -> None:
    rows, _ = encode_examples(tokenizer, EXAMPLES, "", 512)
    table = write_table([*rows[:3], None, *rows[3:]], tmp_path / "w")
    assert (table.count, table.dropped, table.digest) == (20, 1, rows_digest(rows))
    assert table.lengths() == [len(row["input_ids"]) for row in rows]
    assert [dict(row) for row in table.dataset()] == rows
    assert read_table(tmp_path / "w") == table
    assert rows_digest(rows[::-1]) != table.digest


def test_streamed_tuning_gives_the_same_files(base: str, data: str, tmp_path: Path) -> None:
    lines = Path(data).read_text().splitlines()
    lines.insert(3, json.dumps({"instruction": "मुझे नमस्ते कहो", "output": "नमस्ते 你好"}))
    lines.insert(5, "{broken")
    Path(data).write_text("\n".join(lines))
    for name, stream in (("memory", False), ("disk", True)):
        tune(
            base, data, out=tmp_path / name, settings=QUICK, hold_out=0.2, max_bad_share=0.1, stream=stream, start=CPU,
        )  # fmt: skip
    for file in ("adapter_model.safetensors", "data.json", "training.json", "README.md"):
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / "disk" / file).read_bytes(), file
    facts = json.loads((tmp_path / "disk" / "data.json").read_text(encoding="utf-8"))
    assert facts["sources"][0]["bad"] == {"wrong schema": 1, "too long": 1}
    assert facts["sources"][0]["named"]["too long"][0].startswith("mine.jsonl, line 10:")
    assert not (tmp_path / "disk.work").exists()


def test_a_killed_stream_goes_on(base: str, data: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise Stop

    settings = {**QUICK, "steps": 4, "save_every": 2}
    common: dict[str, Any] = {"settings": settings, "max_bad_share": 0.1, "start": CPU}
    with pytest.raises(Stop):
        tune(base, data, out=tmp_path / "a", stream=True, progress=stop, **common)
    assert (tmp_path / "a.work" / "tokens.arrow").is_file()
    resumed = tune(base, data, out=tmp_path / "a", **common)  # also without the stream: the tokens are the same
    whole = tune(base, data, out=tmp_path / "b", stream=True, **common)
    assert (resumed.resumed_from, whole.resumed_from) == (2, 0)
    assert resumed.losses == whole.losses


def test_what_a_stream_cannot_do_is_said(base: str, data: str, tmp_path: Path) -> None:
    for change in ({"examples": 5}, {"harmful_share": 0.2}):
        with pytest.raises(InputError, match="cannot be mixed"):
            tune(base, data, out=tmp_path / "a", settings=QUICK, stream=True, start=CPU, **change)
    with pytest.raises(InputError, match=r"1 of 41 rows cannot be used \(1 too long\)"):
        tune(base, data, out=tmp_path / "a", settings=QUICK, stream=True, start=CPU)
    (tmp_path / "mine.work").mkdir()
    (tmp_path / "mine.work" / "thesis.txt").write_text("years of work")
    (tmp_path / "mine.work" / "run.json").write_text("{}")  # a common name, and no sign of ours
    for stream in (False, True):
        with pytest.raises(InputError, match="resafe did not write it"):
            tune(base, data, out=tmp_path / "mine", settings=QUICK, max_bad_share=0.1, stream=stream, start=CPU)
    assert (work_directory(tmp_path / "mine") / "thesis.txt").read_text() == "years of work"


def test_the_table_is_not_in_memory(tmp_path: Path) -> None:
    """3,000 rows of 400 tokens, 9.6 MB on disk and 80 MB as lists: writing them takes the memory of 256."""

    def rows() -> Any:
        for n in range(3000):
            ids = [n % 500] * 400
            yield {"input_ids": ids, "labels": ids}

    tracemalloc.start()
    table = write_table(rows(), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.path.stat().st_size > 9_600_000
    assert peak < 4_000_000
    assert table.dataset()[2999]["labels"][:2] == [499, 499]
