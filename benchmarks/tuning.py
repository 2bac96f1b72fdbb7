"""Throughput of `resafe tune` against TRL's SFTTrainer with its defaults, on the same model and the same rows.

Both train SmolLM2-135M-Instruct on Alpaca-GPT4 rows, on this machine, in turns, the loss on answers only. TRL gets the
rows as prompt and completion turns and everything else at its default (batch 8, gradient checkpointing, bfloat16
autocast over float32 weights, no packing); the full run likewise. Ours is `train_sft` with the preset's precision and
the same batch of 8. Counted are real tokens: those of the rows, without padding, and the answers among them; the rows
of a round are the same for both, so that both see equal numbers of both.

    python benchmarks/tuning.py [--json] [--rows 32] [--rounds 2] [--data-dir DIR] [--only lora|full]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import base_model, finish

from resafe.checkpoints import load_tokenizer
from resafe.data.intake_sources import load_training
from resafe.data.items import Example
from resafe.training import LoraSettings, SftSettings, train_sft
from resafe.training.sft import encode_examples
from resafe.training.start import autocast_for, start_model

BATCH = 8
LORA = LoraSettings(rank=16)


def option(name: str, default: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def ours(
    base: Any, tokenizer: Any, rows: Sequence[Example], full: bool, out: Path, dtype: Any = "auto", **changes: Any
) -> float:
    """Seconds of training, without loading and saving; `changes` are settings that differ."""
    common: dict[str, Any] = {
        "epochs": 1, "batch_size": BATCH, "max_tokens": 1024, "warmup_steps": 0, "save_every": 0, "device": "cpu",
        "autocast": autocast_for("cpu", "auto") if full else "auto",
    }  # fmt: skip
    settings = SftSettings(**{**common, **changes})
    model = start_model(base, full=full, device="cpu", dtype=dtype)
    lora = None if full else LORA
    return train_sft(
        model=model, tokenizer=tokenizer, examples=rows, settings=settings, out=out, system="", lora=lora
    ).seconds


def theirs(base: Any, tokenizer: Any, rows: Sequence[Example], full: bool, out: Path) -> float:
    """Seconds of `SFTTrainer.train`'s steps, without loading and saving."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "system", "content": ""}, {"role": "user", "content": row.prompt}],
                "completion": [{"role": "assistant", "content": row.response}],
            }
            for row in rows
        ]
    )
    clock = Clock()
    config = SFTConfig(
        output_dir=str(out), num_train_epochs=1, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True
    )
    peft = None if full else LoraConfig(r=LORA.rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=str(base.path), args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft,
        callbacks=[clock],
    )  # fmt: skip
    trainer._send_telemetry = lambda *args, **kwargs: None  # no network here
    trainer.train()
    return float(clock.seconds)


def main() -> None:
    """Prints the table."""
    rows_each, rounds = int(option("--rows", "32")), int(option("--rounds", "2"))
    data_dir = Path(option("--data-dir", str(Path(__file__).parents[2] / "shared" / "data")))
    base = base_model()
    tokenizer = load_tokenizer(base)
    rows = load_training("alpaca_gpt4_en", "examples", data_dir=data_dir).examples
    figures: dict[str, float] = {}
    print(f"{'weights':8} {'rows':>5} {'tokens':>7} {'answers':>8} {'TRL tok/s':>10} {'ours tok/s':>11} {'ratio':>6}")
    for kind in ("lora", "full"):
        if option("--only", kind) != kind:
            continue
        ratios, totals = [], [0, 0, 0.0, 0.0]
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(rounds):
                picked = rows[turn * rows_each : (turn + 1) * rows_each]
                encoded, _ = encode_examples(tokenizer, picked, "", 1024)
                pair = [theirs, ours] if turn % 2 == 0 else [ours, theirs]
                seconds = {
                    run.__name__: run(base, tokenizer, picked, kind == "full", Path(folder) / f"{run.__name__}-{turn}")
                    for run in pair
                }
                print(f"  {kind}, round {turn + 1}: " + ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()))
                ratios.append(seconds["theirs"] / seconds["ours"])
                totals[0] += sum(len(row["input_ids"]) for row in encoded)
                totals[1] += sum(label != -100 for row in encoded for label in row["labels"])
                totals[2] += seconds["theirs"]
                totals[3] += seconds["ours"]
        value = statistics.median(ratios)
        print(
            f"{kind:8} {rounds * rows_each:5} {totals[0]:7} {totals[1]:8} {totals[0] / totals[2]:10.0f} "
            f"{totals[0] / totals[3]:11.0f} {value:6.2f}"
        )
        figures[f"tuning_speedup_{kind}"] = value
    finish(figures)


if __name__ == "__main__":
    main()
