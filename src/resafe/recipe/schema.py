"""The schema of a recipe: which model, data, training, methods and measures. Imports no torch; knows nothing of how."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from resafe.recipe.select import ChoiceRule

_NAME = re.compile(r"\w[\w.-]*")  # names become directories
_LATER: dict[str, Any] = {"later": True}
"""Marks a field that was added later: left out of dumps at its default, so that digests of earlier runs stay."""


class Part(BaseModel):
    """A part of a recipe; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        for name, info in type(self).model_fields.items():
            if info.json_schema_extra == _LATER and getattr(self, name) == info.get_default(call_default_factory=True):
                values.pop(name, None)
        return values


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
    safety: list[str] = Field(
        default=["embedded"],
        min_length=1,
        description="sets of safety pairs; of a question set, six prompts in ten, with short refusals over the "
        "model's own answers",
    )
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
    max_bad_share: float = Field(
        default=0.01, ge=0, le=1, json_schema_extra=_LATER, description="refuse a set of which more rows are unusable"
    )
    overlap_hub: bool = Field(
        default=False,
        json_schema_extra=_LATER,
        description="to leave out training rows that are evaluated, also ask the Hub for sets that are not in data_dir",
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

    steps: int | None = Field(default=None, ge=1, description="give steps or epochs")
    epochs: float | None = Field(default=None, gt=0, json_schema_extra=_LATER)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(default=16, ge=1)
    warmup_steps: int = Field(default=5, ge=0)
    max_tokens: int = Field(default=256, ge=8)
    max_answer_tokens: int | None = Field(
        default=None, ge=1, description="learn only this many tokens of each answer (SFT)"
    )
    whole_share: float = Field(default=0.0, ge=0, le=1, description="share of the examples whose answers are not cut")
    micro_batch_size: int | None = Field(
        default=None, ge=1, json_schema_extra=_LATER, description="examples of one forward pass; null: the whole batch"
    )
    gradient_checkpointing: bool = Field(default=False, json_schema_extra=_LATER)

    @model_validator(mode="after")
    def _length(self) -> TrainPart:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of steps and epochs")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size must divide batch_size {self.batch_size}")
        return self


class DpoPart(TrainPart):
    """Preference optimisation after SFT."""

    beta: float = Field(default=0.1, gt=0)


class AlignPart(Part):
    """Alignment: refuse the harmful, answer the harmless."""

    lora: LoraPart | None = Field(default=LoraPart(), description="null: all weights are trained, in tuning too")
    sft: TrainPart
    examples: int | None = Field(
        default=None, ge=1, json_schema_extra=_LATER, description="rows of SFT by epochs; null: as many as pairs"
    )
    refusal_share: float = Field(default=0.45, gt=0, lt=1, description="share of refusals among the examples")
    dpo: DpoPart | None = None


class TunePart(TrainPart):
    """Fine-tuning on a task, continuing the aligned adapter; with a harmful share it is the attack."""

    task: str = Field(description="arithmetic, extraction, or an instruction set: gsm8k, alpaca_gpt4_zh, a file, …")
    examples: int | None = Field(default=None, ge=1, description="size of the training mix; null: all rows of a set")
    harmful_share: float = Field(default=0.0, ge=0, lt=1)
    measured_by: list[str] | None = Field(
        default=None,
        min_length=1,
        json_schema_extra=_LATER,
        description="tasks of `utility` that give its task score, such as copa; null: the task's own questions",
    )


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
    mask_of: str | list[str] | None = Field(
        default=None, description="use this other entry's mask, or the mean of several entries' masks"
    )
    frontier: bool = Field(default=False, description="evaluate every strength on the test questions")

    @property
    def refers_to(self) -> list[str]:
        """The entries whose masks this one uses or measures, in order."""
        given = self.keep_rate_of or self.mask_of or []
        return [given] if isinstance(given, str) else list(given)


class ValidationPart(Part):
    """How many validation items choose a strength, and by what rule; they are disjoint from training and test."""

    harmful: int = Field(default=42, ge=1)
    harmless: int = Field(default=56, ge=1)
    task: int = Field(default=40, ge=1)
    max_new_tokens: int = Field(default=12, ge=1)
    allowed_over_refusal: float = Field(
        default=ChoiceRule.allowed,
        ge=0,
        le=1,
        json_schema_extra=_LATER,
        description="share of harmless questions refused, above the tuned model, that costs nothing in the choice",
    )
    over_refusal_price: float = Field(
        default=ChoiceRule.price,
        ge=0,
        allow_inf_nan=False,
        json_schema_extra=_LATER,
        description="what a point of over-refusal beyond that costs, in points of recovery",
    )


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


class UtilityPart(Part):
    """Tasks of lm-eval that every model of the recipe is measured on (`resafe eval utility`)."""

    tasks: list[str] = Field(min_length=1, description="copa, xcopa_zh, xnli_hi, gsm8k, humaneval, mmlu, …")
    limit: int | dict[str, int] | None = Field(default=None, description="first items only, of all tasks or by task")
    fewshot: int | None = Field(default=None, ge=0, description="worked examples a prompt; null: each task's own")
    chat: bool = Field(default=False, description="prompts through the chat template")
    max_new_tokens: int | None = Field(default=None, ge=1, description="of written answers; null: each task's own")
    batch_size: int = Field(default=32, ge=1)


class ReportPart(Part):
    """What the page and the workbook show."""

    corrected: bool = Field(default=False, description="also rates of refusal corrected for the judge's errors")


class Recipe(Part):
    """A whole experiment: align, tune, realign, compare, evaluate, report."""

    name: str
    title: str = ""
    seed: int = 0
    seeds: list[int] | None = Field(
        default=None,
        min_length=1,
        json_schema_extra=_LATER,
        description="train everything once a seed, pool the table; a number n stands for 0 … n - 1; null: `seed` alone",
    )
    scale: dict[str, dict[str, Any]] = Field(
        default={}, json_schema_extra=_LATER, description="named sets of changes, applied by --scale NAME"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="frozen weights in memory; auto: bfloat16 where the hardware multiplies it"
    )
    model: ModelPart
    data: DataPart = DataPart()
    align: AlignPart
    tune: dict[str, TunePart] = Field(min_length=1)
    realign: dict[str, RealignPart] = {}
    questions: QuestionsPart = QuestionsPart()
    utility: UtilityPart | None = Field(default=None, json_schema_extra=_LATER, description="tasks of lm-eval")
    evaluate_base: bool = Field(
        default=False, json_schema_extra=_LATER, description="also evaluate the model everything starts from"
    )
    report: ReportPart = Field(default=ReportPart(), json_schema_extra=_LATER)
    release: str | None = Field(default=None, description="the entry to put into OUT/model; null: the first realigned")

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        return list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _measures(self) -> Recipe:
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is named twice")
        tasks = self.utility.tasks if self.utility else []
        for name, part in self.tune.items():
            if name in tasks:
                raise ValueError(f"tune: the name '{name}' is that of a task in utility.tasks; choose another")
            for measure in part.measured_by or []:
                if measure.partition(":")[0] not in tasks:
                    known = ", ".join(tasks) or "none"
                    raise ValueError(f"tune.{name}.measured_by: '{measure}' is not in utility.tasks; there: {known}")
        for name, entry in self.realign.items():
            blind = [task for task in entry.tuned if task in self.tune and self.tune[task].measured_by]
            if blind and entry.strength is None:
                raise ValueError(
                    f"realign.{name}.strength: give one; '{blind[0]}' has no validation questions to choose it by"
                )
        return self

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        for name, entry in self.realign.items():
            for tuned in entry.tuned:
                if tuned not in self.tune:
                    raise ValueError(f"realign.{name}.tuned: no tuned model '{tuned}'; known: {', '.join(self.tune)}")
            if entry.keep_rate_of and entry.mask_of:
                raise ValueError(f"realign.{name}: keep_rate_of and mask_of exclude each other; give one of them")
            if entry.mask_of == []:
                raise ValueError(f"realign.{name}.mask_of: names no entry; name one, or leave it out")
            earlier = list(self.realign)[: list(self.realign).index(name)]
            for other in entry.refers_to:
                if other not in earlier:
                    field, known = "keep_rate_of" if entry.keep_rate_of else "mask_of", ", ".join(earlier) or "none"
                    raise ValueError(f"realign.{name}.{field}: no earlier entry '{other}'; earlier ones: {known}")
                if entry.refers_to.count(other) > 1:
                    raise ValueError(f"realign.{name}.mask_of: names '{other}' twice; name each entry once")
        for name in (*self.tune, *self.realign):
            if not _NAME.fullmatch(name):
                raise ValueError(f"'{name}' cannot be a name: use letters, digits, '.', '_' and '-'")
        if sides := {"harmful", "harmless"} & set(self.tune):
            raise ValueError(f"tune: the name '{min(sides)}' is taken; choose another")
        names = {"aligned", *(f"tuned-{task}" for task in self.tune)} | ({"base"} if self.evaluate_base else set())
        taken = names & set(self.realign)
        if taken:
            raise ValueError(f"realign: the name '{min(taken)}' is taken; choose another")
        if self.release is not None and self.release not in self.realign:
            raise ValueError(f"release: no entry '{self.release}' in realign; known: {', '.join(self.realign)}")
        return self

    @property
    def released(self) -> str:
        """The entry whose model is copied to OUT/model; empty where nothing is realigned."""
        if self.release is not None:
            return self.release
        realigned = (name for name, entry in self.realign.items() if entry.kind == "realigned")
        return next(realigned, next(iter(self.realign), ""))

    @property
    def each_seed(self) -> tuple[int, ...]:
        """The seeds that everything is trained with."""
        return tuple(self.seeds) if self.seeds else (self.seed,)

    @property
    def full(self) -> bool:
        """Whether all weights are trained, and not an adapter."""
        return self.align.lora is None
