"""Where an LLM judge is asked and how. Holds the name of the variable with the key, never the key."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

from resafe.cachedir import cache_root
from resafe.errors import InputError
from resafe.evals.llm.budget import Prices

OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible API.

    Attributes:
        model: Its name there.
        base_url: Address up to and with `/v1`; None is `$OPENAI_BASE_URL`, else OpenAI's own.
        key_env: The environment variable that holds the key. It may be unset for an address of the user's own.
        max_tokens: Most tokens of a reply.
        concurrency: Most requests under way at once.
        per_minute: Most requests started in a minute; None for no limit.
        retries: Further tries of a request after a fault that may pass.
        backoff: Seconds before the first of them, doubled each time, drawn between half and all of it; a server's
            Retry-After goes before it.
        timeout: Seconds for a whole reply, however slowly it trickles in.
        structured: Ask for JSON of the verdict's schema (`response_format`).
        price_in, price_out: Money for a million tokens.
        max_cost: No request is sent that could cross it.
        cache: File of replies; None is one per model in resafe's cache.
    """

    model: str = "gpt-4.1"
    base_url: str | None = None
    key_env: str = "OPENAI_API_KEY"
    max_tokens: int = 512
    concurrency: int = 16
    per_minute: int | None = None
    retries: int = 6
    backoff: float = 0.5
    timeout: float = 120.0
    structured: bool = True
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency", "timeout", "backoff"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}", "give a number above 0")
        if self.retries < 0 or (self.per_minute is not None and self.per_minute < 1):
            raise InputError(f"retries is {self.retries}, per_minute {self.per_minute}", "neither can be that small")
        if (self.price_in is None) != (self.price_out is None):
            raise InputError("only one of price_in and price_out is given", "give both, per million tokens")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("base_url is not an http address", "give one such as http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query:
            raise InputError("base_url carries credentials or a query", f"put the key into ${self.key_env}")

    @property
    def address(self) -> str:
        """The base address in force."""
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")

    @property
    def prices(self) -> Prices | None:
        """The user's prices, if given."""
        if self.price_in is None or self.price_out is None:
            return None
        return Prices(self.price_in, self.price_out)

    @property
    def cache_file(self) -> Path:
        """Where replies are kept."""
        if self.cache is not None:
            return Path(self.cache).expanduser()
        name = re.sub(r"[^\w.-]+", "-", f"{urlsplit(self.address).netloc}-{self.model}")
        return cache_root() / "judges" / f"{name}.jsonl"

    def key(self) -> str:
        """The key from the environment; a placeholder for an address of the user's own that may need none.

        Raises:
            InputError: OpenAI is asked and there is no key, or it is none that a header can carry.
        """
        found = os.environ.get(self.key_env, "").strip()
        if not (found.isascii() and found.isprintable()):
            raise InputError(f"the key in {self.key_env} has characters that no key has", "copy it again")
        if found:
            return found
        if self.address == OPENAI:
            raise InputError(
                f"no key: the environment variable {self.key_env} is not set",
                f"export {self.key_env}=…, or give base_url for a server of your own",
            )
        return "none"


def with_endpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """A judge's function with the settings of `Endpoint` after its own; its first argument is the endpoint of them.

    The signature of a registered function is its schema, so the settings stand in it as if they were written out.
    """
    shared = {item.name: item.default for item in fields(Endpoint)}
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    hints = get_type_hints(Endpoint) | get_type_hints(function)

    def made(**settings: Any) -> Any:
        endpoint = Endpoint(**{name: value for name, value in settings.items() if name in shared})
        return function(endpoint, **{name: value for name, value in settings.items() if name not in shared})

    made.__doc__, made.__module__ = function.__doc__, function.__module__
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shared[name]) for name in shared]
    made.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
    made.__annotations__ = {p.name: hints[p.name] for p in (*own, *parameters)}
    return made
