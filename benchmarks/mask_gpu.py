"""A mask-training step at the shapes of Llama-2-7B with random weights, on a GPU: time and peak memory.

Adapter space: LoRA of rank 256 on q_proj and v_proj, entry granularity. Weight space: all linear layers of the layers,
row granularity. Weights and task vectors in bfloat16, logits in float32. Each against a plain step (forward and
backward) of the same model with the same weights frozen, over the same batch; `--published` adds the published loop.
Masked weights are formed in one compiled pass on a GPU (`--fused`).

    python benchmarks/mask_gpu.py [--json] [--tiny] [--layers 32] [--batch 16] [--tokens 256] [--published]
                                   [--fused auto|on|off]

`--tiny` runs the whole script at tiny shapes, also on a CPU: a test that it works, no measurement.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import finish
from published import install_published, published_step
from transformers import LlamaConfig, LlamaForCausalLM

from resafe.fusion import Fusion
from resafe.masks import Encoded, MaskSettings, MaskTrainer, TrainSettings, answer_log_probabilities, install_masks
from resafe.masks.batches import Item
from resafe.masks.engine import EngineSettings, checkpoint_layers

LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
TINY = {**LLAMA, "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 4}  # fmt: skip


@dataclass(frozen=True)
class RandomVector:
    """A task vector of random numbers; over a LoRA pair on every named layer, or over these layers' weights."""

    layers: dict[str, tuple[int, int]]
    rank: int | None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes by name."""
        if self.rank is None:
            return {f"{path}.weight": shape for path, shape in self.layers.items()}
        pairs: Iterable[tuple[str, tuple[int, int]]] = (
            entry
            for path, (rows, columns) in self.layers.items()
            for entry in (
                (f"{path}.lora_A.weight", (self.rank, columns)),
                (f"{path}.lora_B.weight", (rows, self.rank)),
            )
        )
        return dict(pairs)

    @property
    def names(self) -> tuple[str, ...]:
        """Sorted."""
        return tuple(sorted(self.shapes))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.shapes[name]

    def aligned(self, name: str) -> torch.Tensor:
        """Of the size that an initialised layer has."""
        return torch.randn(self.shape(name)) * 0.02

    def delta(self, name: str) -> torch.Tensor:
        """A tenth of that."""
        return torch.randn(self.shape(name)) * 0.002

    @property
    def adapter(self) -> None:
        """None: it is of no file."""
        return None

    def factor_modules(self) -> dict[str, tuple[str, str, float]] | None:
        """The pairs, scaled by 1."""
        if self.rank is None:
            return None
        return {path: (f"{path}.lora_A.weight", f"{path}.lora_B.weight", 1.0) for path in self.layers}


def build(shapes: dict[str, int], device: torch.device) -> Any:
    """The model, random, in bfloat16, on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(LlamaConfig(**shapes)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def items_of(count: int, tokens: int, vocabulary: int) -> list[Item]:
    """Pairs of random tokens: half prompt, half answer."""
    drawn = torch.randint(3, vocabulary, (count, 3, tokens // 2), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        Item(number, "safety", Encoded(tuple(prompt), tuple(won)), Encoded(tuple(prompt), tuple(lost)))
        for number, (prompt, won, lost) in enumerate(drawn)
    ]


def measured(step: Callable[[], object], device: torch.device, rounds: int) -> tuple[float, float]:
    """Median seconds of a step, and peak bytes on a GPU (0 on a CPU)."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), float(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)


def plain_step(model: Any, items: list[Item]) -> None:
    """Forward and backward through frozen weights."""
    sums, lengths = answer_log_probabilities(model, [item.chosen for item in items], 0)
    (-sums / lengths).mean().backward()


def run(space: str, shapes: dict[str, int], rank: int, asked: argparse.Namespace) -> dict[str, float]:
    """The figures of one space."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    items = items_of(asked.batch, asked.tokens, shapes["vocab_size"])
    model = build(shapes, device)
    wanted = ("q_proj", "v_proj") if space == "adapter" else ("_proj",)
    layers = {
        path: (child.out_features, child.in_features)
        for path, child in model.named_modules()
        if isinstance(child, torch.nn.Linear) and any(part in path for part in wanted)
    }
    vector = RandomVector(layers, rank if space == "adapter" else None)
    model.enable_input_require_grads()
    plain, plain_peak = measured(partial(plain_step, model, items), device, asked.rounds)
    model.disable_input_require_grads()
    mask = MaskSettings(granularity="entry" if space == "adapter" else "row")
    fusion = Fusion("task_arithmetic")
    logits = install_masks(model, [vector], mask, seed=0, combine=fusion.combine, linear=True, storage=torch.bfloat16)
    if asked.checkpointing:
        checkpoint_layers(model)
    training = TrainSettings(loss=asked.loss, batch_size=asked.batch, shares={"safety": 1.0})
    engine = EngineSettings(storage="bfloat16", fused=asked.fused)
    made = MaskTrainer(model, logits, items, training, pad_id=0, engine=engine)
    masked, peak = measured(partial(made.step, 0), device, asked.rounds)
    figures = {
        f"step_s_{space}": masked, f"plain_s_{space}": plain, f"step_ratio_{space}": masked / plain,
        f"peak_gb_{space}": peak / 1e9, f"plain_peak_gb_{space}": plain_peak / 1e9,
        f"masked_entries_{space}": float(sum(value.numel() for value in logits.values.values())),
    }  # fmt: skip
    del model, made, logits
    if asked.published:
        policy, reference = build(shapes, device), build(shapes, device)
        optimizer = torch.optim.AdamW(install_published(policy, vector, trains=True), lr=5e-3, weight_decay=0.0)
        install_published(reference, vector, trains=False)
        chosen, rejected = [i.chosen for i in items], [i.rejected for i in items if i.rejected]
        theirs, their_peak = measured(
            partial(published_step, policy, reference, chosen, rejected, 0, optimizer), device, asked.rounds
        )
        figures |= {f"published_s_{space}": theirs, f"published_peak_gb_{space}": their_peak / 1e9}
    return figures


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss", default="sft")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--fused", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--only", default="adapter,full")
    asked = parser.parse_args()
    shapes = dict(TINY if asked.tiny else LLAMA)
    shapes["num_hidden_layers"] = asked.layers or (2 if asked.tiny else 32)
    figures: dict[str, float] = {}
    for space in asked.only.split(","):
        figures |= run(space, shapes, 4 if asked.tiny else asked.rank, asked)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{card}, {shapes['num_hidden_layers']} layers, batch {asked.batch} × {asked.tokens} tokens, {asked.loss}")
    for name, value in figures.items():
        print(f"{name:26} {value:12.4g}")
    finish(figures)


if __name__ == "__main__":
    main()
