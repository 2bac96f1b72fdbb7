"""What two processes compute, for `test_processes`: started by torchrun, results go to a directory."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from resafe.fusion import Fusion
from resafe.masks import MaskSettings, MaskTrainer, TrainSettings, encode_items, teachers
from resafe.masks.engine import EngineSettings, checkpoint_layers
from resafe.masks.logits import held_here, sharded, whole
from resafe.masks.processes import ALONE, launched, shard
from resafe.realign import Problem
from resafe.realign.scores import masked_model, removal_scores
from resafe.realign.warm import WarmStart, warm_logits, warm_scores
from tests.evals.tiny import tiny_tokenizer
from tests.tiny import KEEP, PAIRS, Lab, Source

ITEMS = encode_items(tiny_tokenizer(), None, PAIRS, KEEP, keep_of=[0, 1, 1])
SHORT = TrainSettings(steps=6, batch_size=7, warmup_steps=2, shares={"safety": 0.4, "harmless": 0.3, "task": 0.3})
TIES = Fusion("ties", {"keep": 0.4})
CASES: dict[str, tuple[tuple[str, ...], str, MaskSettings, TrainSettings, Fusion]] = {
    "default": (("tuned",), "safe", MaskSettings(), SHORT, Fusion("task_arithmetic")),
    "dpo": (
        ("tuned",),
        "safe",
        MaskSettings(granularity="rank"),
        replace(SHORT, loss="sigmoid", removal_price=0.3, task_divergence=0.5),
        Fusion("task_arithmetic"),
    ),
    "paper": (
        ("tuned",),
        "safe",
        MaskSettings(sampling="relaxed", rescale="mean"),
        replace(SHORT, loss="sigmoid", reference="random", shares={"safety": 1.0}, max_norm=0.01),
        Fusion("task_arithmetic"),
    ),
    "distill": (
        ("tuned",),
        "safe",
        MaskSettings(initial=2.5),
        replace(SHORT, loss="distill", removal_price=1.0),
        Fusion("task_arithmetic"),
    ),
    "quantiles": (
        ("tuned",),
        "safe",
        MaskSettings(),
        replace(SHORT, loss="aot", reference="aligned"),
        Fusion("task_arithmetic"),
    ),
    "weights": (("full", "full2"), "base", MaskSettings(granularity="layer"), SHORT, Fusion("average")),
    "all weights": (("full_all",), "full", MaskSettings(), replace(SHORT, loss="distill"), Fusion("task_arithmetic")),
    "several": (("tuned", "tuned2"), "safe", MaskSettings(), replace(SHORT, loss="distill"), Fusion("average")),
    "tied": (("tied_full",), "tied", MaskSettings(granularity="row"), SHORT, Fusion("task_arithmetic")),
    "dora": (("dora",), "base", MaskSettings(), replace(SHORT, loss="distill"), Fusion("task_arithmetic")),
    "ties": (("tuned", "tuned2"), "safe", MaskSettings(per_task=True), replace(SHORT, loss="ipo"), TIES),
}


def trainer(
    lab: Lab,
    case: str,
    work: Path | None = None,
    again: bool = False,
    dtype: torch.dtype = torch.float32,
    engine: EngineSettings | None = None,
    **more: Any,
) -> MaskTrainer:
    from resafe.deltas import task_vector

    tuned, aligned, mask, training, fusion = CASES[case]
    vectors = [task_vector(lab.open(name), lab.open(aligned)) for name in tuned]
    source = Source(lab, "tied" if aligned == "tied" else "base")
    model, logits = masked_model(Problem(vectors, fusion, source=source), mask, 0, apart=case == "several")
    model.to(dtype)
    logits.to(torch.float32)
    if again:
        checkpoint_layers(model)
    processes = launched()
    if processes.world > 1:
        shard(model, logits)
    return MaskTrainer(model, logits, ITEMS, training, pad_id=1, work=work, processes=processes, engine=engine, **more)


def first_step(made: MaskTrainer) -> dict[str, torch.Tensor]:
    """Gradients of the first step, its loss, and the logits after it."""
    found = {"loss": torch.tensor(made.step(0)["loss"])}
    for key, value in made.logits.values.items():
        assert value.grad is not None
        found[f"grad/{key}"] = whole(value.grad).clone()
        found[f"logits/{key}"] = whole(value.detach()).clone()
    return found


def scores(made: MaskTrainer) -> dict[str, torch.Tensor]:
    """First-order scores at the present masks."""
    found = removal_scores(made.model, made.logits, ITEMS, 3, 1, processes=made.processes or ALONE)
    assert all(sharded(value) == (made.processes.world > 1) for value in found.values())
    return {key: whole(value) for key, value in found.items()}


def warm_starts(lab: Lab, work: Path) -> dict[str, Any]:
    """Scores for a warm start, computed and read back, where the logits start from them, and what they hold here."""
    from resafe.deltas import task_vector

    made, warm = trainer(lab, "default"), WarmStart(share=0.1, removed=-2.0, kept=2.5, examples=3)
    of = Problem([task_vector(lab.open("tuned"), lab.open("safe"))], work=work)
    found: dict[str, Any] = {}
    for name, settings in (("scores", warm), ("stored", warm), ("magnitude", replace(warm, scores="magnitude"))):
        some = warm_scores(of, settings, made.model, made.logits, ITEMS, 1, processes=made.processes)
        found[name] = {key: whole(value) for key, value in some.items()}
        made.logits.start_from(made.logits.settings, warm_logits(some, warm, made.processes))
        found[f"from {name}"] = logits_of(made)
        found[f"held {name}"] = sum(held_here(value).numel() for value in some.values())
    return found


def stopped(made: MaskTrainer) -> MaskTrainer:
    """Trains up to a checkpoint, and stops without a word."""
    for step in range(4):
        made.step(step)
        if step == 2:
            from resafe.masks.state import save_training

            assert made.work is not None
            save_training(made.work, 3, made.logits, made.optimizer, made.identity(), made.processes)
    return made


def logits_of(made: MaskTrainer) -> dict[str, torch.Tensor]:
    return {key: whole(value.detach()).clone() for key, value in made.logits.values.items()}


def main(root: Path, out: Path) -> None:
    lab, processes = Lab(root), launched()
    found: dict[str, Any] = {}
    for case in CASES:
        found[case] = first_step(trainer(lab, case))
    found["shared prompts"] = first_step(trainer(lab, "dpo", engine=EngineSettings(share_prompts=True)))
    found["scores"] = scores(trainer(lab, "default"))
    found["warm"] = warm_starts(lab, out / "warm")
    found["checkpointed"] = first_step(trainer(lab, "default", again=True))
    straight = trainer(lab, "dpo")
    straight.run()
    found["straight"] = logits_of(straight)
    stopped(trainer(lab, "dpo", out / "work"))
    resumed = trainer(lab, "dpo", out / "work", checkpoint_every=100)
    found["resumed at"] = resumed.resume()
    resumed.run()
    found["resumed"] = logits_of(resumed)
    found["teachers kept"] = trainer(lab, "several").teachers().kept
    teachers.goes_on_from_states = lambda *_: processes.main  # one process that cannot is enough
    passing = trainer(lab, "several")
    found["teachers pass"], found["teachers kept then"] = first_step(passing), passing.teachers().kept
    if processes.main:
        torch.save(found, out / "found.pt")
    processes.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
