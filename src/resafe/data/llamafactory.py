"""LLaMA-Factory's `dataset_info.json`, read as it is: which file or Hub set an entry means, and its layout.

Source: the `data/README.md` of LLaMA-Factory (github.com/hiyouga/LLaMA-Factory).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe.data.formats import Layout
from resafe.errors import InputError
from resafe.registry import nearest

INFO = "dataset_info.json"

_OURS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "messages": "messages", "chosen": "chosen", "rejected": "rejected",
}  # fmt: skip
_FIELDS = {
    "file_name", "file_sha1", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "formatting",
    "ranking", "subset", "split", "folder", "num_samples", "columns", "tags",
}  # fmt: skip
_UNREAD = {"tools", "images", "videos", "audios", "kto_tag"}


@dataclass(frozen=True)
class Entry:
    """One entry of the file.

    Attributes:
        name: Its name.
        file: The file it names; None if it is on the Hub.
        hub: Its Hub id.
        subset: Its configuration on the Hub.
        split: Its split.
        folder: A folder inside the Hub set.
        limit: Use only this many rows.
        ranking: Whether its rows are preference pairs.
        layout: Where things are in a row.
    """

    name: str
    file: Path | None
    hub: str | None
    subset: str | None
    split: str
    folder: str | None
    limit: int | None
    ranking: bool
    layout: Layout


def read_entry(info: Path, name: str) -> Entry:
    """Reads one entry.

    Args:
        info: The `dataset_info.json`; files it names lie beside it.
        name: The entry.

    Raises:
        InputError: No such file or entry, bad JSON, an unknown field, or a source that resafe cannot read.
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
    if unknown := sorted(set(raw) - _FIELDS):
        raise InputError(f"{where}: unknown field '{unknown[0]}'", nearest(unknown[0], sorted(_FIELDS)))
    formatting = raw.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise InputError(f"{where}: formatting is {formatting!r}", "it must be alpaca, sharegpt or openai")
    hub, file = raw.get("hf_hub_url"), raw.get("file_name")
    if hub is None and file is None:
        source = next(
            (key for key in ("script_url", "ms_hub_url", "om_hub_url", "cloud_file_name") if key in raw), None
        )
        raise InputError(
            f"{where}: {f'resafe does not read {source}' if source else 'no file_name and no hf_hub_url'}",
            "give a file_name or an hf_hub_url",
        )
    return Entry(
        name=name,
        file=info.parent / str(file) if hub is None else None,
        hub=hub,
        subset=raw.get("subset"),
        split=raw.get("split", "train"),
        folder=raw.get("folder"),
        limit=raw.get("num_samples"),
        ranking=bool(raw.get("ranking", False)),
        layout=_layout(raw, str(formatting), where),
    )


def _layout(raw: dict[str, Any], formatting: str, where: str) -> Layout:
    given, tags = raw.get("columns") or {}, raw.get("tags") or {}
    unread = sorted(set(given) & _UNREAD)
    if unknown := sorted(set(given) - set(_OURS) - _UNREAD):
        raise InputError(f"{where}: unknown column '{unknown[0]}'", nearest(unknown[0], sorted(_OURS)))
    if {"images", "videos", "audios"} & set(unread):
        raise InputError(f"{where}: column '{unread[0]}': resafe trains on text only", "choose a text set")
    columns = {_OURS[key]: value for key, value in given.items() if key in _OURS and value}
    if formatting == "alpaca":
        return Layout(columns)
    columns.setdefault("messages", "messages" if formatting == "openai" else "conversations")
    defaults = ("role", "content", "user", "assistant") if formatting == "openai" else ("from", "value", "human", "gpt")
    role, content, user, assistant = (
        tags.get(key, default)
        for key, default in zip(("role_tag", "content_tag", "user_tag", "assistant_tag"), defaults, strict=True)
    )
    roles = {user: "user", assistant: "assistant", tags.get("system_tag", "system"): "system"}
    return Layout(columns, role, content, roles)
