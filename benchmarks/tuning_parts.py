"""What each part of `resafe tune`'s throughput is worth: the same training with one part changed, in turns.

Each round trains the same model on the same rows as `benchmarks/tuning.py`'s own side does, once as it is and once with
each change; printed is changed over own, in seconds, the median of the rounds: above 1 the change makes it slower. On a
machine that is busy, `--cpu-time` counts the processor time of one thread instead of time on the wall.

    python benchmarks/tuning_parts.py [--json] [--rows 16] [--rounds 2] [--data-dir DIR] [--full] [--cpu-time]
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from common import base_model, finish
from tuning import option, ours

from resafe.checkpoints import load_tokenizer
from resafe.data.intake_sources import load_training

VARIANTS = {
    "checkpointing": "gradient checkpointing on",
    "grouping": "batches drawn at random, not by length",
    "head": "TRL's own output layer, not the one on answers only",
    "bf16": "float32 throughout",
    "packing": "packing on",
}


def shuffled(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """As `length_grouped_order`, without regard to lengths."""
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += rng.sample(range(len(lengths)), len(lengths))
    return order[: steps * batch_size]


@contextmanager
def changed(name: str) -> Iterator[dict[str, object]]:
    """In it a part is changed; the settings that belong to it."""
    settings: dict[str, dict[str, object]] = {
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"dtype": "float32", "autocast": "off"},
        "packing": {"packing": True},
    }
    if name == "grouping":
        with mock.patch("resafe.training.order.length_grouped_order", shuffled):
            yield {}
    elif name == "head":
        with mock.patch("resafe.training.trainers.install", return_value=None):
            yield {}
    else:
        yield settings.get(name, {})


def main() -> None:
    """Prints the table."""
    rows_each, rounds = int(option("--rows", "16")), int(option("--rounds", "2"))
    data_dir = Path(option("--data-dir", str(Path(__file__).parents[2] / "shared" / "data")))
    base, full = base_model(), "--full" in sys.argv
    tokenizer = load_tokenizer(base)
    rows = load_training("alpaca_gpt4_en", "examples", data_dir=data_dir).examples
    if "--cpu-time" in sys.argv:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time  # what `train_sft` counts its seconds by
    seconds: dict[str, list[float]] = {name: [] for name in ("", *VARIANTS)}
    for turn in range(rounds):
        picked = rows[turn * rows_each : (turn + 1) * rows_each]
        for name in seconds if turn % 2 == 0 else reversed(seconds):
            with tempfile.TemporaryDirectory() as folder, changed(name) as settings:
                seconds[name].append(ours(base, tokenizer, picked, full, Path(folder) / "out", **settings))
            print(f"  round {turn + 1}, {name or 'as it is'}: {seconds[name][-1]:.1f} s", flush=True)
    figures = {}
    for name, title in VARIANTS.items():
        ratios = [one / own for one, own in zip(seconds[name], seconds[""], strict=True)]
        figures[f"tuning_ratio_{name}"] = statistics.median(ratios)
        print(f"{title:52} {statistics.median(ratios):5.2f} ({', '.join(f'{value:.2f}' for value in ratios)})")
    finish(figures)


if __name__ == "__main__":
    main()
