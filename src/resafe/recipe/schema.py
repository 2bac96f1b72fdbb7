"""The schema of a recipe: which model, data, training, methods and measures. Imports no torch; knows nothing of how."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_NAME = re.compile(r"\w[\w.-]*")  # names become directories


class Part(BaseModel):
    """A part of a recipe; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(Part):
    """The chat model everything starts from."""

    reference: str = Field(description="path, org/name, file.gguf or package:NAME/file.gguf")
    allow_pickle: bool = Field(False, description="also read pickled weights, as plain tensors")
    system: str | None = Field(
        default=None, description='system turn of every prompt; null: the template\'s own, "": empty'
    )


class DataPart(Part):
    """Where safety pairs and helpful answers for training come from."""

    data_dir: Path | None = Field(default=None, description="directory with the files of public sets; null: the Hub")
    safety: list[str] = Field(default=["embedded"], min_length=1, description="sets of safety pairs")
    harmless: list[str] = Field(
        default=["embedded"],
        min_length=1,
        description="sets of harmless requests with answers; of a question set, six prompts in ten, which the model "
        "itself answers before it is aligned",
    )
    safety_limit: int | None = Field(
        default=None, ge=1, description="at most this many safety pairs, one a prompt first"
    )
    harmless_limit: int | None = Field(default=None, ge=1)
    helpful_opening: str = Field(
        default="", description='what every helpful training answer begins with, e.g. "Sure. "'
    )
    short_refusals: bool = Field(
        default=False, description="short refusals in place of the safe answers of public pairs, which often advise"
    )


class LoraPart(Part):
    """The adapter that alignment trains and tuning continues."""

    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="null: twice the rank")
    targets: str | list[str] = Field(
        default="all-linear", description="all-linear, module names, or a regular expression"
    )


class TrainPart(Part):
    """One training run."""

    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(default=16, ge=1)
    warmup_steps: int = Field(default=5, ge=0)
    max_tokens: int = Field(default=256, ge=8)
    max_answer_tokens: int | None = Field(
        default=None, ge=1, description="learn only this many tokens of each answer (SFT)"
    )
    whole_share: float = Field(default=0.0, ge=0, le=1, description="share of the examples whose answers are not cut")


class DpoPart(TrainPart):
    """Preference optimisation after SFT."""

    beta: float = Field(default=0.1, gt=0)


class AlignPart(Part):
    """Alignment: refuse the harmful, answer the harmless."""

    lora: LoraPart = LoraPart()
    sft: TrainPart
    refusal_share: float = Field(default=0.45, gt=0, lt=1, description="share of refusals among the examples")
    dpo: DpoPart | None = None


class TunePart(TrainPart):
    """Fine-tuning on a task, continuing the aligned adapter; with a harmful share it is the attack."""

    task: str = Field(description="arithmetic, extraction, or an instruction set that has questions: gsm8k")
    examples: int = Field(ge=1, description="size of the training mix")
    harmful_share: float = Field(default=0.0, ge=0, lt=1)


class FusionPart(Part):
    """How the masked task vectors are combined."""

    name: str = "task_arithmetic"
    settings: dict[str, Any] = {}


class RealignPart(Part):
    """One realigned model, or one baseline."""

    method: str
    tuned: list[str] = Field(min_length=1, description="names of tuned models")
    kind: Literal["realigned", "baseline"] = "baseline"
    title: str | None = None
    settings: dict[str, Any] = {}
    fusion: FusionPart = FusionPart()
    strength: float | None = Field(default=None, description="null: chosen on validation questions")
    keep_rate_of: str | None = Field(default=None, description="remove the share that this other entry's mask removes")
    mask_of: str | None = Field(default=None, description="use this other entry's mask")
    frontier: bool = Field(default=False, description="evaluate every strength on the test questions")


class ValidationPart(Part):
    """How many validation items choose a strength; they are disjoint from training and test."""

    harmful: int = Field(default=42, ge=1)
    harmless: int = Field(default=56, ge=1)
    task: int = Field(default=40, ge=1)
    max_new_tokens: int = Field(default=12, ge=1)


class QuestionsPart(Part):
    """What models are evaluated on."""

    harmful: list[str] = Field(default=["harmful"], min_length=1)
    harmless: list[str] = Field(default=["harmless"], min_length=1)
    text: str = Field(default="plain_text", description="texts for perplexity")
    harmful_limit: int | None = Field(default=None, ge=1)
    harmless_limit: int | None = Field(default=None, ge=1)
    task_items: int = Field(default=300, ge=1)
    max_new_tokens: int = Field(default=24, ge=1, description="of answers to harmful and harmless questions")
    task_max_new_tokens: int = Field(default=40, ge=1)
    batch_size: int = Field(default=128, ge=1)
    validation: ValidationPart = ValidationPart()


class Recipe(Part):
    """A whole experiment: align, tune, realign, compare, evaluate, report."""

    name: str
    title: str = ""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="frozen weights in memory; auto: bfloat16 where the hardware multiplies it"
    )
    model: ModelPart
    data: DataPart = DataPart()
    align: AlignPart
    tune: dict[str, TunePart] = Field(min_length=1)
    realign: dict[str, RealignPart] = Field(min_length=1)
    questions: QuestionsPart = QuestionsPart()
    release: str | None = Field(default=None, description="the entry to put into OUT/model; null: the first realigned")

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        for name, entry in self.realign.items():
            for tuned in entry.tuned:
                if tuned not in self.tune:
                    raise ValueError(f"realign.{name}.tuned: no tuned model '{tuned}'; known: {', '.join(self.tune)}")
            for field in ("keep_rate_of", "mask_of"):
                other = getattr(entry, field)
                earlier = list(self.realign)[: list(self.realign).index(name)]
                if other is not None and other not in earlier:
                    known = ", ".join(earlier) or "none"
                    raise ValueError(f"realign.{name}.{field}: no earlier entry '{other}'; earlier ones: {known}")
            if entry.keep_rate_of and entry.mask_of:
                raise ValueError(f"realign.{name}: keep_rate_of and mask_of exclude each other; give one of them")
        for name in (*self.tune, *self.realign):
            if not _NAME.fullmatch(name):
                raise ValueError(f"'{name}' cannot be a name: use letters, digits, '.', '_' and '-'")
        if sides := {"harmful", "harmless"} & set(self.tune):
            raise ValueError(f"tune: the name '{min(sides)}' is taken; choose another")
        taken = {"aligned", *(f"tuned-{task}" for task in self.tune)} & set(self.realign)
        if taken:
            raise ValueError(f"realign: the name '{min(taken)}' is taken; choose another")
        if self.release is not None and self.release not in self.realign:
            raise ValueError(f"release: no entry '{self.release}' in realign; known: {', '.join(self.realign)}")
        return self

    @property
    def released(self) -> str:
        """The entry whose model is copied to OUT/model."""
        if self.release is not None:
            return self.release
        realigned = (name for name, entry in self.realign.items() if entry.kind == "realigned")
        return next(realigned, next(iter(self.realign)))
