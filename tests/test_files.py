"""Files that appear whole or not at all, and lists of names."""

from __future__ import annotations

from pathlib import Path

import pytest

from resafe.files import replacing, split_names, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_whole(path, "one\nline \ud800 ends\r\n")
    assert path.read_bytes() == b"one\nline ? ends\r\n"
    with replacing(path) as beside:
        assert beside.suffix == ".json" and beside.parent == path.parent and beside != path
        beside.write_text("two")
        assert path.read_bytes().startswith(b"one")
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as beside:
        beside.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("given", "names"),
    [("a, b,,a ", ("a", "b")), ("", ()), (["a,b", " c", "b"], ("a", "b", "c")), (" , ", ())],
)
def test_names(given: object, names: tuple[str, ...]) -> None:
    assert split_names(given) == names  # type: ignore[arg-type]
