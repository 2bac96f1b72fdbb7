"""What bfloat16 weights are worth on this machine: answers and adapter training steps, against float32.

python benchmarks/precision.py [--json] [--rounds 3]
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from common import TARGETS, alternate, base_model, finish, ratio
from peft import LoraConfig, get_peft_model

from resafe.checkpoints import load_model, load_tokenizer, resolve_dtype
from resafe.data.embedded import harmful_rows
from resafe.data.pairs import safety_pairs
from resafe.evals import generate
from resafe.masks import answer_log_probabilities, encode_items


def main() -> None:
    """Prints the table."""
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 3
    base = base_model()
    tokenizer = load_tokenizer(base)
    prompts = [row.prompt for row in harmful_rows("test")][:128]
    batch = [item.chosen for item in encode_items(tokenizer, "", safety_pairs(harmful_rows("train"))[:16], [])]
    models: dict[str, Any] = {name: load_model(base, dtype=name) for name in ("float32", "bfloat16")}  # type: ignore[arg-type]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")

    def answer(name: str) -> None:
        generate(models[name], tokenizer, prompts, system="", max_new_tokens=16)

    def step(name: str) -> None:
        trained = models[name]
        trained.zero_grad(set_to_none=True)
        sums, lengths = answer_log_probabilities(trained, batch, int(tokenizer.pad_token_id))
        (-sums / lengths).mean().backward()

    print(f"{'work':28} {'float32 s':>10} {'bfloat16 s':>11} {'speed-up':>9}")
    figures: dict[str, float] = {}
    for key, title, work in (
        ("generation", "128 answers of 16 tokens", answer),
        ("training", "adapter step of 16", step),
    ):
        if key == "training":
            models = {name: get_peft_model(model.requires_grad_(False), lora) for name, model in models.items()}
        slow, fast = alternate(lambda work=work: work("float32"), lambda work=work: work("bfloat16"), rounds)
        figures[f"bfloat16_speedup_{key}"] = ratio(slow, fast)
        print(f"{title:28} {statistics.median(slow):10.2f} {statistics.median(fast):11.2f} {ratio(slow, fast):9.2f}")
    print(f"dtype: auto is {str(resolve_dtype('auto')).removeprefix('torch.')} here; torch {torch.__version__}")
    finish(figures)


if __name__ == "__main__":
    main()
