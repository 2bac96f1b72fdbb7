"""The stages that train: alignment, and tuning on each task."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from resafe.provenance import digest_value
from resafe.recipe.context import Context
from resafe.recipe.schema import DpoPart, TrainPart
from resafe.recipe.stage import Stage
from resafe.training import DpoSettings, LoraSettings, SftSettings, train_dpo, train_sft


def settings_of(context: Context, part: TrainPart) -> Any:
    """Training settings from their part of the recipe."""
    common = part.model_dump(include={"steps", "learning_rate", "batch_size", "warmup_steps", "max_tokens"})
    shared = {**common, "seed": context.recipe.seed, "device": context.device, "save_every": 20}
    if isinstance(part, DpoPart):
        return DpoSettings(**shared, beta=part.beta)
    return SftSettings(**shared, max_answer_tokens=part.max_answer_tokens, whole_share=part.whole_share)


def align(context: Context) -> Stage:
    """SFT on refusals and helpful answers, then DPO if asked: θ_a as an adapter on the base model."""
    recipe = context.recipe

    def work(path: Path) -> dict[str, Any]:
        part, material = recipe.align, context.material
        examples = material.align_examples(part.sft.steps * part.sft.batch_size, part.refusal_share, recipe.seed)
        lora = LoraSettings(
            rank=part.lora.rank,
            alpha=part.lora.alpha,
            targets=part.lora.targets if isinstance(part.lora.targets, str) else tuple(part.lora.targets),
        )
        first = path / ("sft" if part.dpo else "adapter")
        result = train_sft(
            model=context.plain(),
            tokenizer=context.tokenizer,
            examples=examples,
            settings=settings_of(context, part.sft),
            out=first,
            system=context.system,
            lora=lora,
            progress=context.reporter.bar("align: SFT", "steps"),
        )
        if part.dpo:
            result = train_dpo(
                model=result.model,
                tokenizer=context.tokenizer,
                pairs=material.pairs,
                settings=settings_of(context, part.dpo),
                out=path / "adapter",
                system=context.system,
                progress=context.reporter.bar("align: DPO", "steps"),
            )
        return {
            "tokens_per_second": round(result.tokens_per_second, 1),
            "examples": len(examples),
            "pairs_dropped": material.dropped,
        }

    depends = {
        "model": context.base.digest,
        "system": recipe.model.system,
        "data": context.material_digest,
        "align": recipe.align.model_dump(mode="json"),
        "seed": recipe.seed,
        "dtype": context.dtype,
    }
    return context.run.stage("align", depends, work)


def tune(context: Context, name: str, aligned: Stage) -> Stage:
    """Continues the aligned adapter on a task, with the harmful share mixed in: θ_k."""
    part = context.recipe.tune[name]

    def work(path: Path) -> dict[str, Any]:
        mix = context.mix(name)
        result = train_sft(
            model=context.load(context.open_stage(aligned), merge=False),
            tokenizer=context.tokenizer,
            examples=mix,
            settings=settings_of(context, part),
            out=path / "adapter",
            system=context.system,
            progress=context.reporter.bar(f"tune: {name}", "steps"),
        )
        return {"tokens_per_second": round(result.tokens_per_second, 1), "examples": len(mix)}

    examples = digest_value([asdict(example) for example in context.mix(name)])
    depends = {
        "aligned": aligned.digest,
        "tune": part.model_dump(mode="json"),
        "examples": examples,
        "seed": context.recipe.seed,
        "dtype": context.dtype,
    }
    return context.run.stage(f"tune-{name}", depends, work)
