"""Many prompts to one endpoint: cached, paced, retried and paid for once. Knows no rubric."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from resafe.errors import InputError, ResafeError
from resafe.evals.llm.attempt import Outcome, send
from resafe.evals.llm.budget import Estimate, Ledger, estimated_tokens
from resafe.evals.llm.cache import ReplyCache
from resafe.evals.llm.replies import response_format
from resafe.evals.llm.settings import Endpoint

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        system: Its instruction; may be empty.
        user: The user's turn.
        shape: What binds the reply, if anything does.
        assistant: A turn after the user's, for guard models, which judge the last turn of a conversation.
        extra: Further fields of the request.
    """

    system: str
    user: str
    shape: type[BaseModel] | None = None
    assistant: str | None = None
    extra: dict[str, Any] | None = None

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation."""
        roles = (("system", self.system or None), ("user", self.user), ("assistant", self.assistant))
        return [{"role": role, "content": text} for role, text in roles if text is not None]


@dataclass(frozen=True)
class Answer:
    """A reply's text, or None with what went wrong."""

    text: str | None
    trouble: str = ""


class Asker:
    """Asks one endpoint. Safe to kill: what was answered is on disk and not asked again."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.ledger = Ledger(endpoint.prices, endpoint.max_cost)
        self._cache = ReplyCache(endpoint.cache_file)
        self._pace = _Pace(endpoint.per_minute)
        self._reached = False

    def estimate(self, prompts: Sequence[Prompt]) -> Estimate:
        """What asking would cost at most, without faults; sends nothing."""
        bodies = {self._digest(body): body for body in map(self._body, prompts)}
        new = [body for key, body in bodies.items() if self._cache.get(key) is None]
        tokens = sum(map(_tokens_in, new))
        most = len(new) * self.endpoint.max_tokens
        prices = self.endpoint.prices
        cost = prices.cost(tokens, most) if prices else None
        return Estimate(len(new), len(bodies) - len(new), tokens, most, cost)

    def ask(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """As many answers as prompts, in their order; equal prompts are asked once.

        Raises:
            InputError: No key, or the estimate is over the budget (nothing is sent then).
            ResafeError: The endpoint cannot be reached, refuses the key, or cannot do what is asked.
        """
        bodies = [self._body(prompt) for prompt in prompts]
        keys = [self._digest(body) for body in bodies]
        todo = {key: body for key, body in zip(keys, bodies, strict=True) if self._cache.get(key) is None}
        troubles: dict[str, str] = {}
        if todo:
            self.ledger.check(self.estimate(prompts))
            try:
                troubles = run_sync(lambda: self._all(todo, self.endpoint.key()))
            finally:
                self._cache.close()
        return [_answer(self._cache.get(key), troubles.get(key, "")) for key in keys]

    async def _all(self, todo: dict[str, dict[str, Any]], key: str) -> dict[str, str]:
        """Asks all; replies go to the cache, troubles are returned."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise InputError(f"LLM judges need openai ({error})", "pip install 'resafe[eval]'") from None
        troubles: dict[str, str] = {}
        queue = iter(todo.items())
        end: list[ResafeError] = []
        async with AsyncOpenAI(api_key=key, base_url=self.endpoint.address, max_retries=0, timeout=None) as client:

            async def work() -> None:
                for digest, body in _until(queue, end):
                    outcome = await self._one(client, body, key)
                    if outcome.reply is not None:
                        self._cache.put(digest, outcome.reply)
                    elif outcome.kind == "fatal" or (outcome.kind == "unreachable" and not self._reached):
                        end.append(_fatal(outcome, self.endpoint))
                    else:
                        troubles[digest] = outcome.message

            await asyncio.gather(*(work() for _ in range(min(self.endpoint.concurrency, len(todo)))))
        if end:
            raise end[0]
        return troubles

    async def _one(self, client: Any, body: dict[str, Any], key: str) -> Outcome:
        """One request with its retries, within the budget."""
        endpoint, tokens = self.endpoint, _tokens_in(body)
        for attempt in range(endpoint.retries + 1):
            await self._pace.turn()
            while (held := self.ledger.hold(tokens, endpoint.max_tokens)) is None:
                if not self.ledger.waiting:
                    return Outcome("refused", "not asked: max_cost is reached")
                await asyncio.sleep(0.05)  # requests under way may cost less than was set aside
            outcome = await send(client, body, endpoint.timeout, key)
            self.ledger.settle(held, self._spent(outcome, held))
            self._reached = self._reached or outcome.kind != "unreachable"
            if outcome.kind not in ("again", "unreachable"):
                return outcome
            if attempt < endpoint.retries:
                if outcome.wait is not None:
                    self._pace.hold(outcome.wait)
                await asyncio.sleep(outcome.wait or random.uniform(0.5, 1) * min(60, endpoint.backoff * 2**attempt))
        tries = endpoint.retries + 1
        return Outcome(outcome.kind, f"{outcome.message}, {tries} {'tries' if tries > 1 else 'try'}")

    def _spent(self, outcome: Outcome, held: float) -> float:
        """What a try cost: the server's count where it gives one, else all that was set aside if it may have worked."""
        if outcome.reply is None:
            return held if outcome.charged else 0.0
        if outcome.reply["tokens"] is None or self.ledger.prices is None:
            return held
        return self.ledger.prices.cost(*outcome.reply["tokens"])

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": prompt.turns,
            "temperature": 0,
            "max_tokens": self.endpoint.max_tokens,
        }
        if prompt.shape is not None and self.endpoint.structured:
            body["response_format"] = response_format(prompt.shape)
        return {**body, **({"extra_body": prompt.extra} if prompt.extra else {})}

    def _digest(self, body: dict[str, Any]) -> str:
        """SHA-256 of the address and the whole request: whatever changes the reply changes the digest."""
        text = json.dumps([self.endpoint.address, body], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class _Pace:
    """When the next request may start: evenly spaced under a rate limit, later if the server asked to wait."""

    def __init__(self, per_minute: int | None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._gap
        if start > now:
            await asyncio.sleep(start - now)

    def hold(self, seconds: float) -> None:
        self._next = max(self._next, time.monotonic() + seconds)


def run_sync(make: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Runs a coroutine to its end, also where a loop is running already (notebooks, Inspect)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(make())).result()


def _until(queue: Iterator[tuple[str, dict[str, Any]]], end: list[ResafeError]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The queue's items, until something ended it all."""
    for item in queue:
        if end:
            return
        yield item


def _answer(stored: dict[str, Any] | None, trouble: str) -> Answer:
    if stored is None:
        return Answer(None, trouble or "not asked")
    if stored.get("refusal"):
        return Answer(None, "the judge refused")
    if stored.get("finish") == "length":
        return Answer(None, "the judge's reply was cut off at max_tokens")
    if stored.get("finish") == "content_filter":
        return Answer(None, "the endpoint's content filter stopped the judge")
    return Answer(stored.get("text") or None, "" if stored.get("text") else "the judge said nothing")


def _fatal(outcome: Outcome, endpoint: Endpoint) -> ResafeError:
    if outcome.kind == "unreachable":
        return ResafeError(f"{endpoint.address}: cannot be reached: {outcome.message}", "is the server up?")
    if "response_format" in outcome.message:
        return InputError(f"{endpoint.address}: {outcome.message}", "give structured=false")
    return InputError(f"{endpoint.address}: {outcome.message}", f"check the model's name and ${endpoint.key_env}")


def _tokens_in(body: dict[str, Any]) -> int:
    """Estimated tokens of a request; ten for each turn's frame, and the schema counts too."""
    frame = 10 * len(body["messages"]) + estimated_tokens(json.dumps(body.get("response_format", "")))
    return frame + sum(estimated_tokens(turn["content"]) for turn in body["messages"])
