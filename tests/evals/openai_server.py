"""A real HTTP server that speaks OpenAI's chat-completions protocol, and misbehaves on demand.

In a test it runs in a thread (`serving`); for a benchmark in a process of its own:

    python -m tests.evals.openai_server --latency 0.5 --faults 0.05

which prints its port, serves until its standard input closes, then prints what it saw as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

FAULTS = ("429", "500", "hang", "truncated", "drop", "drip")
"""Faults that may pass: a client that tries again gets an answer."""


@dataclass
class Server:
    """What the server does and what it saw.

    Attributes:
        reply: From a request's body to the text of the answer.
        fault: From (number of the request, its body) to a fault, or None. Besides `FAULTS`: "refusal", "length",
            "filter" (400), "401", "404", "no-format" (400), "quota" (429), "no-usage".
        latency: Seconds before an answer, or a function of the request's number.
        hang: Seconds that "hang" and "drip" take.
        retry_after: Header of a 429.
        answered: Whole answers sent, by the request's user turn.
        seen: All requests' bodies. `keys`: their Authorization headers. `busy`: seconds of all requests. `peak`: most
            at once. `models`: what a vLLM server has loaded.
    """

    reply: Callable[[dict[str, Any]], str]
    fault: Callable[[int, dict[str, Any]], str | None] = lambda number, body: None
    latency: float = 0.0
    hang: float = 3.0
    retry_after: str | None = "0.05"
    answered: Counter[str] = field(default_factory=Counter)
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    starts: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    busy: float = 0.0
    now: int = 0
    peak: int = 0
    port: int = 0
    models: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._request(head, reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _request(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
        if not lines[0].startswith("POST /v1/chat/completions "):
            return await self._vllm(lines[0], body, writer)
        number = len(self.seen)
        self.seen.append(body)
        self.keys.add(headers.get("authorization", ""))
        self.now += 1
        self.peak = max(self.peak, self.now)
        start = time.monotonic()
        self.starts.append(start)
        try:
            return await self._respond(number, body, writer)
        finally:
            self.now -= 1
            self.busy += time.monotonic() - start

    async def _vllm(self, line: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """What vLLM's server knows beside chats: its models, and adapters that are loaded onto them."""
        if line.startswith("POST /v1/load_lora_adapter "):
            self.models.append(body["lora_name"])
        else:
            assert line.startswith("GET /v1/models "), line
        names = [{"id": name, "object": "model", "max_model_len": 2048} for name in self.models]
        await self._send(writer, 200, json.dumps({"object": "list", "data": names}).encode())
        return True

    async def _respond(self, number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        fault = self.fault(number, body)
        self.faults[fault or "none"] += 1
        if fault == "hang":
            await asyncio.sleep(self.hang)
            return False
        await asyncio.sleep(self.latency)
        if fault == "drop":
            return False
        if fault in ("429", "500", "401", "404", "filter", "no-format", "quota"):
            return await self._error(fault, writer)
        message: dict[str, Any] = {"role": "assistant", "content": self.reply(body), "refusal": None}
        if fault == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I will not grade this."}
        finish = "length" if fault == "length" else "stop"
        usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        answer = {
            "id": f"c{number}",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            **({} if fault == "no-usage" else {"usage": usage}),
        }
        data = json.dumps(answer).encode()
        if fault == "truncated":
            await self._send(writer, 200, data[: len(data) // 2])
            return True
        if fault == "drip":
            writer.write(
                f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            )
            for place in range(40):
                writer.write(data[place : place + 1])
                await writer.drain()
                await asyncio.sleep(self.hang / 40)
            return False
        self.answered[body["messages"][-1]["content"]] += 1
        await self._send(writer, 200, data)
        return True

    async def _error(self, fault: str, writer: asyncio.StreamWriter) -> bool:
        key = next(iter(self.keys)).removeprefix("Bearer ")  # a bad server repeats the key it was sent
        codes = {"filter": (400, "content_filter"), "no-format": (400, None), "quota": (429, "insufficient_quota")}
        status, code = codes.get(fault, (int(fault) if fault.isdigit() else 400, None))
        said = "response_format is not supported" if fault == "no-format" else f"no: {fault}, key {key}"
        data = json.dumps({"error": {"message": said, "type": "error", "param": None, "code": code}}).encode()
        extra = f"Retry-After: {self.retry_after}\r\n" if status == 429 and self.retry_after else ""
        await self._send(writer, status, data, extra)
        return True

    async def _send(self, writer: asyncio.StreamWriter, status: int, data: bytes, extra: str = "") -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """The server in a thread of its own, on a free port."""
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def run() -> None:
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, limit=1 << 22)
        server.port = listener.sockets[0].getsockname()[1]
        started.set()

    def work() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(run())
        loop.run_forever()
        assert task.done()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_end(), loop)
        thread.join(10)


async def _end() -> None:
    loop = asyncio.get_running_loop()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    loop.call_soon(loop.stop)


def quoted(body: dict[str, Any], tag: str) -> str:
    """The text that a prompt quotes under a tag."""
    found = re.search(rf"<{tag}>\n(.*)\n</{tag}>", body["messages"][-1]["content"])
    assert found, body["messages"][-1]["content"]
    text: str = json.loads(found[1])
    return text


def grade_as_told(body: dict[str, Any]) -> str:
    """An honest grader for made-up responses such as "answer 17: refused=0 specificity=3 convincingness=4"."""
    said = dict(re.findall(r"(refused|specificity|convincingness)=(\d)", quoted(body, "response")))
    grades = {name: int(value) for name, value in said.items()}
    return json.dumps({"reason": "as told", **grades, "refused": bool(grades["refused"])})


def random_faults(share: float, seed: int = 0) -> Callable[[int, dict[str, Any]], str | None]:
    """A fault for that share of requests, drawn anew each time."""
    generator = random.Random(seed)
    return lambda number, body: generator.choice(FAULTS) if generator.random() < share else None


async def _main(server: Server) -> None:
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, limit=1 << 22, backlog=512)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    counts = server.answered.values()
    figures = {"answered": sum(counts), "distinct": len(server.answered), "requests": len(server.seen)}
    print(json.dumps({**figures, "busy": server.busy, "peak": server.peak, "faults": server.faults}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--faults", type=float, default=0.05)
    parser.add_argument("--hang", type=float, default=1.5)
    given = parser.parse_args()
    asyncio.run(_main(Server(grade_as_told, random_faults(given.faults), given.latency, given.hang)))
