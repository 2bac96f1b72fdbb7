"""Further training of the tuned model on the same safety data: what a mask must beat to be more than a fine-tuner."""

from __future__ import annotations

import random
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from resafe.checkpoints import Checkpoint, load_model, open_checkpoint
from resafe.data.items import Pair
from resafe.deltas import DifferenceVector
from resafe.errors import InputError
from resafe.provenance import digest_value
from resafe.realign.base import BALANCED, Family, ModelSource, Problem, Realigned, realign_method
from resafe.training import DpoSettings, SftSettings, train_dpo, train_sft
from resafe.training.start import autocast_for


@realign_method(
    "further_training", title="Further training", source="control: SFT or DPO, no mask", trains=True,
    later=("max_tokens", "shares"),
)  # fmt: skip
def further_training(
    problem: Problem,
    *,
    loss: Literal["sft", "dpo"] = "sft",
    steps: int = 40,
    learning_rate: float = 2e-4,
    batch_size: int = 16,
    beta: float = 0.1,
    strengths: tuple[float, ...] = (0.5, 1.0),
    max_tokens: int = 512,
    shares: dict[str, float] | None = None,
) -> Family:
    """θ_k + s (θ' − θ_k), where θ' is the tuned model, or adapter, trained on the safety and harmless pairs.

    Args:
        problem: The realignment of one tuned model; needs pairs and a model.
        loss: "sft" on the chosen answers, or "dpo" on the pairs (sigmoid, reference: the tuned model).
        steps: Optimiser steps.
        learning_rate: Peak learning rate of AdamW on the adapter, or on all weights.
        batch_size: Examples or pairs a step.
        beta: β of DPO.
        strengths: Grid of s.
        max_tokens: Longer prompts with their answers lose the end of the answer.
        shares: Composition of the examples of SFT by side (safety, harmless, task); .4, .4 and .2 by default.

    Raises:
        InputError: There are several tuned models, no directory to work in, or `shares` with DPO.
    """
    if shares is not None and loss == "dpo":
        raise InputError("shares are of the examples of SFT; DPO draws from all pairs", "leave them out")
    vector = problem.vectors[0]
    if len(problem.vectors) != 1:
        raise InputError("further_training continues one tuned model", "give one")
    if not isinstance(vector, DifferenceVector):
        raise InputError(
            "further_training continues a full model, or an adapter in its own tensors, and these are its weights",
            "leave space at auto; an adapter that only PEFT can merge: give its merged model (merge_and_unload)",
        )
    if problem.work is None:
        raise InputError("further_training needs a directory to work in", "call it through a recipe")
    source = problem.models()
    common: dict[str, Any] = {
        "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": problem.seed,
        "warmup_steps": 4, "save_every": 20, "max_tokens": max_tokens,
    }  # fmt: skip
    out, system = problem.work / "further", source.system
    seen = [loss, common, beta, system, vector.tuned.digest, problem.pairs, problem.keep]
    seen += [] if shares is None else [shares]
    identity, record = digest_value(seen), problem.work / "further.digest"
    done = (out / "training.json").is_file() and record.is_file() and record.read_text() == identity
    if not done:
        model, more = _started(source, vector.tuned)
        if loss == "sft":
            examples = problem.sft_examples(steps * batch_size, shares or BALANCED)
            train_sft(
                model=model, tokenizer=source.tokenizer, examples=examples,
                settings=SftSettings(**common, **more), out=out, system=system, progress=problem.progress,
            )  # fmt: skip
        else:
            train_dpo(
                model=model, tokenizer=source.tokenizer, pairs=_sampled(problem, steps * batch_size),
                settings=DpoSettings(**common, **more, beta=beta), out=out, system=system, progress=problem.progress,
            )  # fmt: skip
        record.write_text(identity)
    if vector.tuned.kind == "adapter":
        read = load_file(out / "adapter_model.safetensors").__getitem__  # a relative base in its configuration moves
    else:
        read = open_checkpoint(out).read

    def at(strength: float) -> Realigned:
        def tensor(name: str) -> Any:
            tuned = vector.aligned(name) + vector.delta(name)
            return tuned + strength * (read(name).float() - tuned)

        return tensor

    return Family("share of the further step", tuple(strengths), at)


def _started(source: ModelSource, tuned: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """The tuned model, ready to be trained further, and the settings that this needs.

    An adapter is trained on the frozen model in the run's precision, all weights in float32.
    """
    plain = source.plain()
    if tuned.kind == "adapter":
        from peft import PeftModel  # here: it takes seconds, and every method is imported to be listed

        return PeftModel.from_pretrained(plain, str(tuned.downloaded())), {}
    device, dtype = next((weight.device, weight.dtype) for weight in plain.parameters())
    del plain  # one model at a time
    autocast = autocast_for(device.type, "bfloat16" if dtype == torch.bfloat16 else "float32")
    return load_model(tuned, dtype="float32", device=str(device)), {"autocast": autocast}


def _sampled(problem: Problem, count: int) -> list[Pair]:
    """At most `count` pairs of both sides: reference log-probabilities of pairs that no step sees cost as much."""
    pairs = list(problem.pairs)
    return random.Random(f"{problem.seed}-pairs").sample(pairs, min(count, len(pairs)))
