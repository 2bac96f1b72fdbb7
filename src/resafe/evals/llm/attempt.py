"""One request to a chat-completions endpoint: what came of it, as a value. No exception leaves with a key.

openai's own client sends it, with its retries off: they do not see a broken body or a reply that never ends, and they
would spend money past a budget. (Inspect's model interface has neither budgets nor a cache that survives `kill -9`.)
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal

Kind = Literal["reply", "again", "unreachable", "refused", "fatal"]


@dataclass(frozen=True)
class Outcome:
    """What one try gave.

    Attributes:
        kind: "reply"; "again" for a fault that may pass; "unreachable" for no connection at all; "refused" where the
            endpoint will not answer this request; "fatal" where it will answer none.
        message: What went wrong, without the server's words where these could repeat a key.
        reply: Text, refusal, finish reason and tokens of a reply.
        wait: Seconds the server asked to wait.
        charged: The endpoint may have done the work although no reply came.
    """

    kind: Kind
    message: str = ""
    reply: dict[str, Any] | None = None
    wait: float | None = None
    charged: bool = False


async def send(client: Any, body: dict[str, Any], timeout: float, key: str) -> Outcome:
    """Sends one request through an `openai.AsyncOpenAI` without retries of its own."""
    import openai

    try:
        async with asyncio.timeout(timeout):
            raw = await client.chat.completions.with_raw_response.create(**body)
            text = raw.text() if callable(raw.text) else raw.text
            return _read(await text if asyncio.iscoroutine(text) else text, key)
    except (TimeoutError, openai.APITimeoutError):
        return Outcome("again", f"no whole reply within {timeout:g} s", charged=True)
    except openai.APIStatusError as error:
        return _status(error, key)
    except openai.APIConnectionError as error:
        cause = type(error.__cause__).__name__ if error.__cause__ else "connection error"
        never = cause in ("ConnectError", "UnsupportedProtocol")
        return Outcome("unreachable" if never else "again", f"connection failed ({cause})", charged=not never)
    except (openai.APIError, ValueError) as error:
        return Outcome("again", f"a reply that is not the protocol's ({type(error).__name__})", charged=True)


def _read(text: str, key: str) -> Outcome:
    """The parts of a completion that a judge needs."""
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message = choice["message"]
        usage = body.get("usage") or {}
        tokens = [int(usage[name]) for name in ("prompt_tokens", "completion_tokens")] if usage else None
        reply = {
            "text": _masked(message.get("content"), key),
            "refusal": _masked(message.get("refusal"), key),
            "finish": choice.get("finish_reason"),
            "tokens": tokens,
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Outcome("again", "a reply that is cut off or not the protocol's", charged=True)
    return Outcome("reply", reply=reply)


def _masked(text: Any, key: str) -> Any:
    """The text without the key; short ones are placeholders and may be words."""
    return text.replace(key, "[key]") if isinstance(text, str) and len(key) > 4 else text


def _status(error: Any, key: str) -> Outcome:
    """What an error status means for this request."""
    status, code = error.status_code, str(getattr(error, "code", None) or "")
    if status in (401, 403):  # the server's message often repeats part of the key
        return Outcome("fatal", f"the endpoint refuses the key (status {status})")
    said = str(_masked(str(error.message), key))
    said = said.splitlines()[0][:200] if said.strip() else ""
    if status == 429 and code == "insufficient_quota":
        return Outcome("fatal", "the account's quota is used up (status 429)")
    if status in (408, 409, 425, 429) or status >= 500:
        return Outcome("again", f"status {status}", wait=_wait(error.response.headers))
    if status == 404 or "response_format" in said:
        return Outcome("fatal", f"the endpoint cannot do what is asked (status {status}: {said})")
    return Outcome("refused", f"status {status}{': ' + code if code else ''}: {said}")


def _wait(headers: Any) -> float | None:
    """Seconds of Retry-After, given as seconds or a date, at most two minutes."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), 120.0) if seconds == seconds else None
