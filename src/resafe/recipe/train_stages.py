"""The stages that train: alignment, and tuning on each task."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from resafe.checkpoints import Checkpoint, Precision, load_model
from resafe.provenance import digest_value
from resafe.recipe.context import Context, read_json
from resafe.recipe.schema import DpoPart, TrainPart
from resafe.recipe.stage import Stage
from resafe.training import DpoSettings, LoraSettings, SftSettings, train_dpo, train_sft
from resafe.training.start import autocast_for


def settings_of(context: Context, part: TrainPart) -> Any:
    """Training settings from their part of the recipe."""
    names = ("steps", "epochs", "learning_rate", "batch_size", "micro_batch_size", "warmup_steps", "max_tokens")
    common = {name: getattr(part, name) for name in (*names, "gradient_checkpointing")}
    if context.recipe.full:
        common["autocast"] = autocast_for(context.device, cast(Precision, context.dtype))
    shared = {**common, "seed": context.recipe.seed, "device": context.device, "save_every": 20}
    if isinstance(part, DpoPart):
        return DpoSettings(**shared, beta=part.beta)
    return SftSettings(**shared, max_answer_tokens=part.max_answer_tokens, whole_share=part.whole_share)


def _start(context: Context, checkpoint: Checkpoint) -> Any:
    """The model to train: an adapter is continued; where all weights are trained, they are kept in float32."""
    if context.recipe.full:
        return load_model(checkpoint, dtype="float32", device=context.device)
    return context.load(checkpoint, merge=False)


def _lora(context: Context) -> LoraSettings | None:
    part = context.recipe.align.lora
    if part is None:
        return None
    targets = part.targets if isinstance(part.targets, str) else tuple(part.targets)
    return LoraSettings(rank=part.rank, alpha=part.alpha, targets=targets)


def losses(stage: Stage, name: str) -> dict[str, list[float]]:
    """The loss of each step of the trainings of a stage, by what they are called on the page."""
    found = {}
    for part in ("sft", "adapter", "model"):
        file = stage.path / part / "training.json"
        if file.is_file():
            recorded = read_json(file)
            found[f"{name}, {recorded['kind'].upper()}" if name == "aligned" else name] = list(recorded["losses"])
    return found


def align(context: Context) -> Stage:
    """SFT on refusals and helpful answers, then DPO if asked: θ_a as an adapter on the base model, or as a model."""
    recipe = context.recipe

    def work(path: Path) -> dict[str, Any]:
        part, material = recipe.align, context.material
        size = part.sft.steps * part.sft.batch_size if part.sft.steps else part.examples or len(material.pairs)
        examples = material.align_examples(size, part.refusal_share, recipe.seed)
        first = path / ("sft" if part.dpo else context.part)
        result = train_sft(
            model=_start(context, context.base),
            tokenizer=context.tokenizer,
            examples=examples,
            settings=settings_of(context, part.sft),
            out=first,
            system=context.system,
            lora=_lora(context),
            progress=context.reporter.bar("align: SFT", "steps"),
        )
        if part.dpo:
            result = train_dpo(
                model=result.model,
                tokenizer=context.tokenizer,
                pairs=material.pairs,
                settings=settings_of(context, part.dpo),
                out=path / context.part,
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
            model=_start(context, context.open_stage(aligned)),
            tokenizer=context.tokenizer,
            examples=mix,
            settings=settings_of(context, part),
            out=path / context.part,
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
