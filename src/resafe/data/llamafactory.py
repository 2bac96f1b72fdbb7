"""LLaMA-Factory's `dataset_info.json`, read as it is: which file or Hub set an entry means, and its layout.

Source: `data/README.md`, `data/parser.py` and `data/converter.py` of LLaMA-Factory (github.com/hiyouga/LLaMA-Factory):
where an entry names columns, only those are read; instruction and input are joined by one line break.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from resafe.data.formats import Layout
from resafe.errors import InputError
from resafe.registry import nearest

INFO = "dataset_info.json"

_OURS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "messages": "messages", "chosen": "chosen", "rejected": "rejected",
}  # fmt: skip
_UNREAD = {"tools", "images", "videos", "audios", "kto_tag"}
_TAGS = {
    "role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag",
}  # fmt: skip


class _Fields(BaseModel):
    """What an entry may say; LLaMA-Factory passes over what it does not know, and so do we."""

    file_name: str | None = None
    file_sha1: str | None = None
    hf_hub_url: str | None = None
    ms_hub_url: str | None = None
    om_hub_url: str | None = None
    script_url: str | None = None
    cloud_file_name: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    revision: str | None = None
    num_samples: int | None = Field(None, ge=1)
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None


@dataclass(frozen=True)
class Entry:
    """One entry of the file.

    Attributes:
        name: Its name.
        file: The file or folder it names; None if it is on the Hub.
        hub: Its Hub id.
        subset: Its configuration on the Hub.
        split: Its split.
        folder: A folder inside the Hub set.
        revision: Branch, tag or commit on the Hub.
        limit: Use only the first so many rows (LLaMA-Factory draws them at random).
        ranking: Whether its rows are preference pairs.
        layout: Where things are in a row.
    """

    name: str
    file: Path | None
    hub: str | None
    subset: str | None
    split: str
    folder: str | None
    revision: str | None
    limit: int | None
    ranking: bool
    layout: Layout


def read_entry(info: Path, name: str) -> Entry:
    """Reads one entry.

    Args:
        info: The `dataset_info.json`; files it names lie beside it.
        name: The entry.

    Raises:
        InputError: No such file or entry, bad JSON, a field that is misspelt or of the wrong kind, or a source or kind
            of rows that resafe cannot train on.
    """
    try:
        entries = json.loads(info.read_text(encoding="utf-8-sig"))
    except OSError:
        raise InputError(f"there is no file {info}", "give the path of LLaMA-Factory's dataset_info.json") from None
    except ValueError as error:
        raise InputError(f"{info}: bad JSON ({error})", "mend the line that it names") from None
    if not isinstance(entries, dict) or name not in entries:
        known = list(entries) if isinstance(entries, dict) else []
        raise InputError(f"{info}: there is no entry '{name}'", nearest(name, known) if known else "the file is empty")
    raw, where = entries[name], f"{info.name}, entry '{name}'"
    if not isinstance(raw, dict):
        raise InputError(f"{where}: it must be an object", "see LLaMA-Factory's data/README.md")
    _check_spelling(raw, _Fields.model_fields, f"{where}: unknown field")
    try:
        found = _Fields.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {place} is {first['input']!r}", first["msg"]) from None
    if found.hf_hub_url is None and found.file_name is None:
        sources = ("script_url", "ms_hub_url", "om_hub_url", "cloud_file_name")
        source = next((key for key in sources if getattr(found, key) is not None), None)
        raise InputError(
            f"{where}: {f'resafe does not read {source}' if source else 'no file_name and no hf_hub_url'}",
            "give a file_name or an hf_hub_url",
        )
    return Entry(
        name=name,
        file=info.parent / str(found.file_name) if found.hf_hub_url is None else None,
        hub=found.hf_hub_url,
        subset=found.subset,
        split=found.split or "train",
        folder=found.folder,
        revision=found.revision,
        limit=found.num_samples,
        ranking=found.ranking,
        layout=_layout(found, where),
    )


def _check_spelling(given: Any, known: Any, what: str) -> None:
    """Raises InputError for a name that is nearly a known one; others are notes of the user's, and passed over."""
    for name in given:
        close = [] if name in known else difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
        if close:
            raise InputError(f"{what} '{name}'", f"did you mean '{close[0]}'?")


def _layout(found: _Fields, where: str) -> Layout:
    given, tags = found.columns or {}, found.tags or {}
    _check_spelling(given, {*_OURS, *_UNREAD}, f"{where}: unknown column")
    _check_spelling(tags, _TAGS, f"{where}: unknown tag")
    for key in ("images", "videos", "audios"):
        if given.get(key):
            raise InputError(f"{where}: column '{key}': resafe trains on text only", "choose a text set")
    if given.get("kto_tag"):
        raise InputError(
            f"{where}: column 'kto_tag': its answers are rated one by one, good and bad",
            "resafe trains on examples and on pairs: make an entry of the good rows alone, or one with ranking",
        )
    columns = {_OURS[key]: value for key, value in given.items() if key in _OURS and value}
    if found.ranking and not given:
        columns = {"chosen": "chosen", "rejected": "rejected"}
    if found.formatting == "alpaca":
        if given and not found.ranking and "output" not in columns:
            raise InputError(
                f"{where}: its columns name no response, so its rows are text to go on from (pre-training)",
                "resafe trains on answers: name the column of the response",
            )
        if not given:
            columns |= {"instruction": "instruction", "input": "input", "output": "output"}
        return Layout(columns, exact=True, join="\n")
    openai = found.formatting == "openai"
    columns.setdefault("messages", "messages" if openai else "conversations")
    defaults = ("role", "content", "user", "assistant") if openai else ("from", "value", "human", "gpt")
    role, content, user, assistant = (
        tags.get(key) or default
        for key, default in zip(("role_tag", "content_tag", "user_tag", "assistant_tag"), defaults, strict=True)
    )
    roles = {user: "user", assistant: "assistant", tags.get("system_tag") or "system": "system"}
    return Layout(columns, role, content, roles, exact=True, join="\n")
