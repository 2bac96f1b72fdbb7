"""Responses from where they lie: a JSONL, JSON or CSV file, records of a run, or a log of Inspect's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resafe.data.sources import Row, read_file
from resafe.errors import InputError
from resafe.evals.judge import Judged


@dataclass(frozen=True)
class Response:
    """A response to judge, and where it belongs.

    Attributes:
        item: What judges see; its id is unique within the file.
        key: Id of the question, the same for all models that were asked it.
        model: The model that gave it; empty where unknown.
        set: The set of questions; empty where unknown.
    """

    item: Judged
    key: str
    model: str = ""
    set: str = ""


def read_responses(path: Path) -> list[Response]:
    """Reads a file with the columns prompt and response; `id`, `model`, `set` and `language` where it has them.

    A `.eval` file is read as a log of Inspect's: the input and the completion of every sample.

    Raises:
        InputError: No such file, a column is missing, or no rows.
    """
    found = _from_log(path) if path.suffix == ".eval" else [_response(row, n) for n, row in enumerate(read_file(path))]
    if not found:
        raise InputError(f"{path} holds no responses", "give a file with the columns prompt and response")
    if len({one.item.id for one in found}) == len(found):
        return found
    return [replace(one, item=replace(one.item, id=str(number))) for number, one in enumerate(found)]


def _response(row: Row, number: int) -> Response:
    def optional(name: str) -> str:
        return str(row.value(name) or "") if row.has(name) else ""

    response = row.value("response", "completion")
    if not isinstance(response, str):
        raise InputError(
            f"{row.place}: the response is {type(response).__name__}, not text", "give text, or none at all"
        )
    prompt = optional("prompt")
    key = optional("id") or prompt or str(number)
    item = Judged(optional("id") or str(number), prompt, response, optional("language") or None)
    return Response(item, key, optional("model"), optional("set"))


def _from_log(path: Path) -> list[Response]:
    if not path.is_file():
        raise InputError(f"there is no file {path}", "check the path")
    from inspect_ai.log import read_eval_log

    try:
        log = read_eval_log(str(path))
    except Exception as error:  # the library raises what its zip and JSON readers raise
        raise InputError(f"{path} is no log of Inspect's: {error}", "give a finished .eval file") from error
    return [
        Response(
            Judged(str(sample.id), _asked(sample.input), sample.output.completion), str(sample.id),
            log.eval.model, log.eval.task,
        )
        for sample in log.samples or []
    ]  # fmt: skip


def _asked(given: Any) -> str:
    if isinstance(given, str):
        return given
    return next((str(message.text) for message in reversed(given) if message.role == "user"), "")
