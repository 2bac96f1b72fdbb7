"""What each part of `resafe tune`'s throughput is worth: the same training with one part changed, in turns.

Each variant trains the same model on the same rows as `benchmarks/tuning.py`'s own side and is timed right after or
before it; printed is variant over own, in seconds, the median of the rounds: above 1 the part makes training faster.

    python benchmarks/tuning_parts.py [--json] [--rows 16] [--rounds 2] [--data-dir DIR] [--full] [--only NAME]
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

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
    figures: dict[str, float] = {}
    for name, title in VARIANTS.items():
        if option("--only", name) != name:
            continue
        ratios, seconds = [], [0.0, 0.0]
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(rounds):
                picked = rows[turn * rows_each : (turn + 1) * rows_each]
                pair = {}
                for side in ("own", "variant") if turn % 2 else ("variant", "own"):
                    with changed(name if side == "variant" else "") as settings:
                        pair[side] = ours(base, tokenizer, picked, full, Path(folder) / f"{side}-{turn}", **settings)
                ratios.append(pair["variant"] / pair["own"])
                seconds = [seconds[0] + pair["own"], seconds[1] + pair["variant"]]
        figures[f"tuning_without_{name}"] = statistics.median(ratios)
        print(
            f"{title:52} {seconds[1]:6.1f} s against {seconds[0]:5.1f} s, ratio {statistics.median(ratios):5.2f} "
            f"({', '.join(f'{value:.2f}' for value in ratios)}), load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    finish(figures)


if __name__ == "__main__":
    main()
