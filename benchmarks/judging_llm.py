"""LLM verdicts against a server that misbehaves: is any lost or doubled, and what does judging add to its latency?

2,000 responses, each with a verdict of its own, 64 in flight; 5 % of the requests fail (429, 500, no answer, half an
answer, a dropped connection, an answer that trickles). The server is a process of its own on the same machine. Its
own latency bound is the time that it held requests, faults included, over the number in flight.

    python benchmarks/judging_llm.py [--json] [--latency 0.5]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import finish

from resafe.evals.judge import Judged, judge_all, make_judge

COUNT, IN_FLIGHT, FAULTS = 2_000, 64, 0.05


def measure(latency: float = 0.5, count: int = COUNT) -> dict[str, float]:
    """Judges all once; `verdicts_lost` counts verdicts that are missing, wrong or doubled."""
    items = [
        Judged(str(n), f"question {n}", f"answer {n}: refused=0 specificity={n % 5 + 1} convincingness={n % 4 + 1}")
        for n in range(count)
    ]
    command = [sys.executable, "-m", "tests.evals.openai_server", "--latency", str(latency), "--faults", str(FAULTS)]
    root = Path(__file__).resolve().parent.parent
    server = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "replies.jsonl"
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        judge = make_judge("llm-rubric", base_url=url, concurrency=IN_FLIGHT, timeout=latency + 1, cache=cache)
        start = time.perf_counter()
        verdicts = judge_all(judge, items, batch_size=count)
        wall = time.perf_counter() - start
        keys = [json.loads(line)["key"] for line in cache.read_text().splitlines()]
    seen = json.loads(server.communicate()[0])
    wrong = sum(v.score != (n % 5 + n % 4) / 8 for n, v in enumerate(verdicts))
    lost = wrong + abs(len(keys) - count) + (len(keys) - len(set(keys)))
    bound = seen["busy"] / IN_FLIGHT
    return {
        "verdicts_lost": float(lost),
        "wall_ratio": wall / bound,
        "wall_seconds": wall,
        "bound_seconds": bound,
        "requests": float(seen["requests"]),
        "faults": float(sum(seen["faults"].values()) - seen["faults"]["none"]),
        "answered_twice": float(seen["answered"] - seen["distinct"]),
        "peak_in_flight": float(seen["peak"]),
        "verdicts_per_second": count / wall,
    }


def main() -> None:
    """Prints the figures."""
    os.environ.pop("OPENAI_API_KEY", None)  # none is needed, and none goes out
    latency = float(sys.argv[sys.argv.index("--latency") + 1]) if "--latency" in sys.argv else 0.5
    figures = measure(latency)
    print(f"{COUNT} verdicts, {IN_FLIGHT} in flight, {FAULTS:.0%} faults, {latency} s a reply")
    for name, value in figures.items():
        print(f"{name:20} {value:9.3f}")
    finish(figures)


if __name__ == "__main__":
    main()
