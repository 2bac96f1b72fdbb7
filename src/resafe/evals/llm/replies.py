"""What a judge's reply says. A verdict counts only where it is due: the whole reply, or its last line."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Shape = TypeVar("Shape", bound=BaseModel)


def read_last(reply: str, shape: type[Shape]) -> Shape | None:
    """The verdict of a reply: a JSON object of that shape that is the whole reply or its last line.

    A verdict anywhere else is not looked at, and a key given twice makes the object void. A closing code fence after
    the last line is overlooked.

    Returns:
        None where there is no such object.
    """
    text = reply.strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[-1] == "```":
        lines.pop()
    for candidate in (text, lines[-1] if lines else ""):
        try:
            return shape.model_validate(json.loads(candidate, object_pairs_hook=_unique), strict=True)
        except (ValueError, ValidationError):
            continue
    return None


def response_format(shape: type[BaseModel]) -> dict[str, Any]:
    """The request field that binds a reply to that shape (structured output)."""
    schema = {**shape.model_json_schema(), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found
