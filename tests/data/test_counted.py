"""The named sets of recipes and masks: bad rows are counted and named; the items are those of `load_set`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resafe.data.counted import CountingReader, load_counted
from resafe.data.material import load_material
from resafe.data.registry import items_digest, load_set
from resafe.errors import InputError
from resafe.recipe.schema import DataPart


def written(path: Path, good: int, bad: list[str]) -> str:
    rows = [json.dumps({"prompt": f"ask {n}?", "chosen": "no", "rejected": "yes"}) for n in range(good)]
    path.write_text("\n".join([*rows, *bad]))
    return str(path)


def test_good_rows_give_the_items_of_load_set(tmp_path: Path) -> None:
    pairs = written(tmp_path / "pairs.jsonl", 5, [])
    one, two = load_set(pairs, kind="pairs"), load_counted(pairs, "pairs")
    assert (two.items, items_digest(two.items)) == (one.items, one.digest)
    assert (two.report.rows, two.report.kept, two.report.bad) == (5, 5, {})


def test_bad_rows_are_named_and_few_are_allowed(tmp_path: Path) -> None:
    bad = ["{", '{"prompt": "a?"}', '{"prompt": "b?", "chosen": "", "rejected": "yes"}']
    reader = CountingReader(max_bad_share=0.03)
    material = load_material([written(tmp_path / "pairs.jsonl", 97, bad)], ["embedded"], read=reader)
    assert len(material.safety) == 97
    (report,) = reader.to_json()
    assert (report["rows"], report["kept"], report["bad"]) == (100, 97, {"wrong schema": 2, "empty": 1})
    assert [line.split(":")[0] for line in report["named"]["wrong schema"]] == [
        "pairs.jsonl, line 98", "pairs.jsonl, line 99",
    ]  # fmt: skip
    assert report["named"]["empty"][0].startswith("pairs.jsonl, line 100: ")
    with pytest.raises(InputError, match=r"3 of 100 rows cannot be used .* share 0\.01") as caught:
        load_material([str(tmp_path / "pairs.jsonl")], ["embedded"])
    assert "pairs.jsonl, line 98: bad JSON" in caught.value.message


def test_digests_of_recipes_do_not_change() -> None:
    """A field that came later is not, at its default, in what digests of a run are made of."""
    assert "max_bad_share" not in DataPart().model_dump()
    assert DataPart(max_bad_share=0.1).model_dump()["max_bad_share"] == 0.1
