"""What a mask-training step costs, in time against a plain step and the published loop, and in memory.

Step ratios: a plain step is a forward and backward over the same batch with the same weights requiring gradients
(adapter space: the LoRA weights of the tuned PEFT model; weight space: all masked weights, of the layers that an
adapter touches or, "all", every parameter of the model), without an optimiser. The masked step includes the draw or
sigmoid, the product, both passes and the optimiser. Loss sft, which takes one pass; and the preset `default`, whose
teachers (the aligned model on pairs, the tuned one on task examples) say once before the first step what the run will
ask of them, against a plain step over the same batch. What that takes is told apart, and "first" counts with each step
what the teachers took for a batch: a first training that meets no item twice. A training on items that were met before
pays nothing.

Speed-up: DPO on the same pairs against `published.py`, the published loop with its two models; and the default preset's
loss and price on those pairs' chosen answers, which is all that it reads of them.

Memory: in a process of its own each, the highest resident memory of training in weight space, entry granularity. From
it the same model's with frozen weights over the same batch (weights and activations), and the task vectors, are taken
off; what is left, by masked entry, is what the mask costs: logits, gradients, moments and everything temporary.

    python benchmarks/mask.py [--json] [--rounds 3] [--only ratio,published,memory] [--relaxed] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import alternate, base_model, finish, random_adapter, random_model, ratio
from published import install_published, published_step

from resafe.allocator import LARGE, freed_memory_kept, give_back_memory
from resafe.checkpoints import load_model, load_tokenizer, open_checkpoint
from resafe.data.arithmetic import arithmetic
from resafe.data.embedded import harmful_rows, harmless_rows
from resafe.data.pairs import harmless_pairs, safety_pairs
from resafe.deltas import TaskVector, task_vector
from resafe.fusion import Fusion
from resafe.masks import (
    PRESETS,
    MaskSettings,
    MaskTrainer,
    TrainSettings,
    answer_log_probabilities,
    encode_items,
    install_masks,
)
from resafe.masks.batches import Item
from resafe.masks.engine import EngineSettings

SPACES = {"factors": "adapter", "weights": "full"}
EVERYTHING = "all"
PAIRS = 8
KINDS = ("frozen", "masked", "published")
EIGHT, EARLY, SMALL = ["--optimizer", "adamw_8bit"], ["--early"], ["--logits", "bfloat16"]
CASES: list[tuple[str, str, str, list[str]]] = [
    ("frozen", "", "frozen weights and activations", []),
    ("masked", "_adamw", "masked, AdamW", []),
    ("published", "_published", "published", []),
    ("masked", "_8bit", "eight-bit moments", EIGHT),
    ("masked", "", "eight-bit, steps in backward", [*EIGHT, *EARLY]),
    ("masked", "_bfloat16", "the same, bfloat16 logits", [*EIGHT, *EARLY, *SMALL]),
]
"""Process, figure's name, title, options. The figure without a suffix is the target's: eight-bit moments."""

DEFAULT = PRESETS["default"]


def material(base: Any, examples: int = 0, answer_tokens: int | None = None) -> tuple[list[Item], int]:
    """Items of the embedded pairs and of so many arithmetic problems, and the padding token."""
    tokenizer = load_tokenizer(base)
    pairs = safety_pairs(harmful_rows("train"))[:64] + harmless_pairs(harmless_rows("train"))[:64]
    return encode_items(tokenizer, "", pairs, arithmetic(examples, 0), answer_tokens), int(tokenizer.pad_token_id)


def trainer(
    base: Any,
    vector: TaskVector,
    items: list[Item],
    pad_id: int,
    settings: TrainSettings,
    mask: MaskSettings,
    engine: Any,
) -> MaskTrainer:
    """A masked model ready to train."""
    model, fusion = load_model(base), Fusion("task_arithmetic")
    logits = install_masks(model, [vector], mask, seed=0, combine=fusion.combine, linear=True, storage=engine.dtype)
    if engine.logits == "bfloat16":
        logits.to(torch.bfloat16)
    return MaskTrainer(model, logits, items, settings, pad_id=pad_id, engine=engine)


def teachers_once(made: MaskTrainer) -> float:
    """Seconds that the teachers of a training take for a batch, where they say all that it will ask of them at once."""
    start = time.perf_counter()
    kept = made.teachers().kept
    seconds = time.perf_counter() - start
    print(f"teachers once: {seconds:.2f} s for {kept} items")
    return seconds / kept * made.settings.batch_size


def plain_step(model: Any, batch: list[Any], pad_id: int) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    sums, lengths = answer_log_probabilities(model, batch, pad_id)
    (-sums / lengths).mean().backward()


def step_ratios(base: Any, safe: Any, tuned: Any, whole: Any, rounds: int, relaxed: bool) -> dict[str, float]:
    """Masked steps against plain ones; without a whole tuned model small ones, and not of every parameter."""
    (items, pad_id), figures = material(base), {}
    size = TrainSettings().batch_size if whole else 4
    cases = [("deterministic", "", TrainSettings(batch_size=size), MaskSettings(), items)]
    if relaxed:
        cases.append(("relaxed", "_relaxed", TrainSettings(batch_size=size), MaskSettings(sampling="relaxed"), items))
    of_default = material(base, 64, DEFAULT.answer_tokens)[0]
    cases.append(("default preset", "_default", replace(DEFAULT.training, batch_size=size), DEFAULT.mask, of_default))
    print(f"{'space':9} {'mask':14} {'plain s':>8} {'masked s':>9} {'ratio':>6}")
    for space, key in {**SPACES, **({EVERYTHING: EVERYTHING} if whole else {})}.items():
        if space == EVERYTHING:
            vector, plain = task_vector(whole, base), load_model(whole)
        else:
            vector = task_vector(tuned, safe, space)  # type: ignore[arg-type]
            plain = load_model(tuned, merge=space == "weights")
        plain.requires_grad_(False)
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_("lora_" in name if space == "factors" else name in vector.names)
        for title, suffix, settings, mask, own in cases:
            made = trainer(base, vector, own, pad_id, settings, mask, EngineSettings())
            batch = [item.chosen for item in made.batches.at(0)]
            once = teachers_once(made) if settings.loss == "distill" else 0.0
            masked, bare = alternate(partial(made.step, 0), partial(plain_step, plain, batch, pad_id), rounds)
            value = ratio(masked, bare)
            print(
                f"{space:9} {title:14} {statistics.median(bare):8.2f} {statistics.median(masked):9.2f} {value:6.2f}",
                flush=True,
            )
            figures[f"step_ratio_{key}{suffix}"] = value
            if once:
                first = [seconds + once for seconds in masked]
                figures[f"teacher_seconds_{key}{suffix}"] = once
                figures[f"step_ratio_{key}{suffix}_first"] = ratio(first, bare)
                median = statistics.median(first)
                print(f"{space:9} {'first training':14} {'':8} {median:9.2f} {ratio(first, bare):6.2f}", flush=True)
    return figures


def published_pair(base: Any, vector: TaskVector) -> tuple[Any, Any, Any]:
    """The published loop's policy, reference and optimiser."""
    policy, reference = load_model(base), load_model(base)
    logits = install_published(policy, vector, trains=True)
    install_published(reference, vector, trains=False)
    return policy, reference, torch.optim.AdamW(logits, lr=5e-3, weight_decay=0.0)


def few_pairs(items: list[Item], count: int = PAIRS) -> list[Item]:
    """Half as many safety as harmless pairs as make a batch, numbered anew."""
    halves = [[item for item in items if item.side == side][: count // 2] for side in ("safety", "harmless")]
    return [replace(item, index=number) for number, item in enumerate([*halves[0], *halves[1]])]


def speedups(base: Any, safe: Any, tuned: Any, rounds: int, count: int) -> dict[str, float]:
    """DPO steps, and those of the default preset's objective, against the published loop's on the same pairs."""
    (items, pad_id), figures = material(base), {}
    items = few_pairs(items, count)
    chosen = [item.chosen for item in items]
    rejected = [item.rejected for item in items if item.rejected]
    halves: dict[str, Any] = {"shares": {"safety": 0.5, "harmless": 0.5}, "batch_size": count}
    cases = [
        ("sigmoid", "", TrainSettings(loss="sigmoid", **halves), MaskSettings()),
        ("default preset", "_default", replace(DEFAULT.training, **halves), DEFAULT.mask),
    ]
    print(f"{'space':9} {'objective':14} {'published s':>12} {'resafe s':>9} {'speed-up':>9}")
    for space, key in SPACES.items():
        vector = task_vector(tuned, safe, space)  # type: ignore[arg-type]
        policy, reference, optimizer = published_pair(base, vector)
        theirs = partial(published_step, policy, reference, chosen, rejected, pad_id, optimizer)
        for title, suffix, settings, mask in cases:
            made = trainer(base, vector, items, pad_id, settings, mask, EngineSettings(share_prompts=True))
            once = teachers_once(made) if settings.loss == "distill" else 0.0
            theirs_s, ours_s = alternate(theirs, partial(made.step, 0), rounds)  # the cached reference: in the warm-up
            value = ratio(theirs_s, ours_s)
            seconds = f"{statistics.median(theirs_s):12.2f} {statistics.median(ours_s):9.2f}"
            print(f"{space:9} {title:14} {seconds} {value:9.2f}", flush=True)
            name = "speedup_vs_published" + ("" if key == "adapter" else "_full") + suffix
            figures[name] = value
            if once:
                first = [seconds + once for seconds in ours_s]
                figures[f"{name}_first"] = ratio(theirs_s, first)
                seconds = f"{statistics.median(theirs_s):12.2f} {statistics.median(first):9.2f}"
                print(f"{space:9} {'first training':14} {seconds} {figures[f'{name}_first']:9.2f}", flush=True)
    return figures


def highest() -> int:
    """The highest resident memory since `from_here`, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def from_here() -> None:
    """Forgets the highest resident memory up to now: loading a model takes more than holding it."""
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(kind: str, running: EngineSettings, folder: Path) -> None:
    """Prints the highest memory of three steps, the bytes of the task vectors, and the number of masked entries."""
    base = base_model()
    items, pad_id = material(base)
    items = few_pairs(items)
    vector = task_vector(open_checkpoint(folder / "tuned"), open_checkpoint(folder / "safe"), "weights")
    entries = sum(torch.Size(vector.shape(name)).numel() for name in vector.names)
    settings = TrainSettings(batch_size=PAIRS, shares={"safety": 0.5, "harmless": 0.5})
    batch = [item.chosen for item in items]
    step: Callable[[], object]
    if kind == "frozen":
        plain: Any = load_model(base)
        plain.requires_grad_(False)
        plain.enable_input_require_grads()  # the activations are kept, as where masks learn
        step = partial(plain_step, plain, batch, pad_id)
    elif kind == "published":
        policy, reference, adam = published_pair(base, vector)
        rejected = [item.rejected for item in items if item.rejected]
        step = partial(published_step, policy, reference, batch, rejected, pad_id, adam)
    else:
        step = partial(trainer(base, vector, items, pad_id, settings, MaskSettings(), running).step, 0)
    with freed_memory_kept(LARGE) if kind == "masked" else nullcontext():  # as training does
        step()
        from_here()
        step(), step()
        print(highest(), 4 * entries, entries)


def memory(folder: Path, quick: bool = False) -> dict[str, float]:
    """Bytes that masking costs, by entry, each case in a process of its own; quick: the target's alone."""
    cases = CASES
    if not find_spec("torchao"):
        print("torchao is not installed, and bytes_per_masked_entry needs it: pip install 'resafe[lowbit]'")
        cases = CASES[:3]
    if quick:
        cases = [case for case in cases if case[0] == "frozen" or case[1] == ""] if len(cases) > 3 else cases[:2]
    print(f"{'memory, weight space':32} {'peak GB':>8} {'bytes an entry':>15}")
    figures, frozen = {}, 0
    for kind, name, title, flags in cases:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", kind, "--folder", str(folder), *flags],
            capture_output=True, text=True, check=True, env=os.environ,
        )  # fmt: skip
        peak, deltas, entries = map(int, done.stdout.split()[-3:])
        if kind == "frozen":
            frozen = peak
            print(f"{'frozen weights and activations':32} {peak / 1e9:8.2f}")
            continue
        each = (peak - frozen - deltas) / entries
        print(f"{title:32} {peak / 1e9:8.2f} {each:15.1f}", flush=True)
        figures["bytes_per_masked_entry" + name] = each
    return figures


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="ratio,published,memory")
    parser.add_argument("--relaxed", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tries whether it runs: one small round, fewest cases")
    parser.add_argument("--peak", choices=KINDS)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--early", action="store_true")
    parser.add_argument("--logits", default="float32")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.peak:
        running = EngineSettings(optimizer=asked.optimizer, logits=asked.logits, step_in_backward=asked.early)
        peak_of(asked.peak, running, asked.folder)
        return
    base, figures, rounds = base_model(), {}, 1 if asked.quick else asked.rounds
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        safe, tuned = (random_adapter(folder / name, base, seed) for seed, name in enumerate(("safe", "tuned"), 1))
        parts = asked.only.split(",")
        with freed_memory_kept(LARGE):  # as training does; plain steps and the published loop have it, too
            if "ratio" in parts:
                whole = None if asked.quick else random_model(folder / "whole", base, 3)
                figures |= step_ratios(base, safe, tuned, whole, rounds, asked.relaxed)
            if "published" in parts:
                figures |= speedups(base, safe, tuned, rounds, 2 if asked.quick else PAIRS)
        if "memory" in parts:
            figures |= memory(folder, asked.quick)
    finish(figures)


if __name__ == "__main__":
    main()
