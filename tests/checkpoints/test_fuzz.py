"""Damaged and hostile checkpoints: with any change of a header or an index, one opens or raises InputError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from resafe.checkpoints import open_checkpoint
from resafe.errors import InputError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.floats(), st.integers(-(2**70), 2**70), st.text(max_size=5),
        st.sampled_from(["F32", "BF16", "../x", "a", "\0"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three tensors in two files, in a directory of its own."""
    path = tmp_path_factory.mktemp("fuzz") / "outer" / "model"
    path.mkdir(parents=True)
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3).bfloat16()}, path / SHARDS[0])
    save_file({"c": torch.zeros(5)}, path / SHARDS[1])
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}}))
    (path / "config.json").write_text("{}")
    save_file({"c": torch.zeros(5)}, path.parent / "outside.safetensors")
    return path


def tree(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """The file with another content; afterwards nothing else may have changed around it."""
    before, root = path.read_bytes(), path.parent.parent
    path.write_bytes(content)
    seen = tree(root)
    try:
        yield
        assert tree(root) == seen
    finally:
        path.write_bytes(before)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def packed(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every part of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(way for key, item in inner for way in places(item, (*at, key)))]


def mutated(value: Any, data: st.DataObject) -> Any:
    """The value with one to three parts replaced or removed."""
    value = deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(value)[1:] or [()])) or (None,)
        if last is None:
            return data.draw(JSON)
        owner = value
        for key in way:
            owner = owner[key]
        if data.draw(st.booleans()):
            owner[last] = data.draw(JSON)
        else:
            del owner[last]
    return value


def opens_or_says_why(path: Path) -> None:
    try:
        opened = open_checkpoint(path)
    except InputError:
        return
    for name, info in opened.tensors.items():
        assert info.file.parent == path
        assert opened.read(name).shape == info.shape


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_change_of_a_header(whole: Path, data: st.DataObject) -> None:
    header, body = header_of(whole / SHARDS[0])
    with changed(whole / SHARDS[0], packed(mutated(header, data), body)):
        opens_or_says_why(whole)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_change_of_the_index(whole: Path, data: st.DataObject) -> None:
    index = json.loads((whole / INDEX).read_text())
    with changed(whole / INDEX, json.dumps(mutated(index, data)).encode()):
        opens_or_says_why(whole)


@settings(max_examples=100, deadline=None)
@given(length=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 400)))
def test_any_other_length_of_the_header_is_refused(whole: Path, length: int) -> None:
    content = (whole / SHARDS[1]).read_bytes()
    if length == int.from_bytes(content[:8], "little"):
        return
    with changed(whole / SHARDS[1], length.to_bytes(8, "little") + content[8:]), pytest.raises(InputError):
        open_checkpoint(whole)


@settings(max_examples=100, deadline=None)
@given(begin=st.integers(-(2**65), 2**65) | st.integers(0, 30), end=st.integers(-(2**65), 2**65) | st.integers(0, 30))
def test_any_other_place_of_the_data_is_refused(whole: Path, begin: int, end: int) -> None:
    header, body = header_of(whole / SHARDS[0])
    if [begin, end] == header["b"]["data_offsets"]:
        return
    header["b"]["data_offsets"] = [begin, end]
    with changed(whole / SHARDS[0], packed(header, body)), pytest.raises(InputError):
        open_checkpoint(whole)


@settings(max_examples=100, deadline=None)
@given(
    before=st.sampled_from(["../", "../../", "./", "/", "/tmp/", "a/../", "..\\", "C:", "sub/", "\0"]),
    name=st.sampled_from(["outside.safetensors", SHARDS[1], "x.safetensors", ""]) | st.text(max_size=6),
)
def test_a_name_that_leads_elsewhere_is_refused(whole: Path, before: str, name: str) -> None:
    index = json.loads((whole / INDEX).read_text())
    index["weight_map"]["c"] = before + name
    with changed(whole / INDEX, json.dumps(index).encode()), pytest.raises(InputError, match="not a plain"):
        open_checkpoint(whole)
