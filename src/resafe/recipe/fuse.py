"""The schema of a fusion file: which models, how they are combined, where the result goes. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from resafe.recipe.schema import Part

Weight = float | list[float] | dict[str, float | list[float]] | str


class FuseModel(Part):
    """One tuned model."""

    reference: str = Field(
        description="path, org/name, base+adapter, file.gguf, s3://bucket/prefix, gs://…, hf://org/name"
    )
    name: str = Field(default="", description="for messages and randomness; default: the reference")
    weight: Weight = Field(
        default=1.0,
        description="coefficient: a number, a list (gradient over the layers), a mapping of name patterns to either, "
        "or a YAML file with one",
    )


class FuseRecipe(Part):
    """A fusion."""

    base: str = Field(
        description="the aligned (or base) model that task vectors are taken from: path, org/name, s3://bucket/prefix"
    )
    models: list[FuseModel] = Field(min_length=1)
    method: str = Field(default="task_arithmetic", description="see: resafe ls fusion")
    settings: dict[str, Any] = Field(default={}, description="of the method")
    out: str | None = Field(default=None, description="directory or s3://bucket/prefix to write; or give --out")
    dtype: Literal["same", "float32", "float16", "bfloat16"] = "same"
    max_shard_size: int | str | None = Field(default=None, description='e.g. "5GB"; null: files as the base has them')
    seed: int = 0
    memory: int | str = Field(default="2GB", description="most that buffers may take")
    device: Literal["cpu", "cuda", "auto"] = Field(default="cpu", description="where methods compute")
    output: Literal["model", "adapter"] = Field(
        default="model", description="adapter: where all models are adapters and the method is a weighted sum"
    )
    rank: int | None = Field(default=None, ge=1, description="of a written adapter, at most; null: the exact sum")
    vocabulary: Literal["refuse", "extend"] = Field(
        default="refuse", description="extend: rows matched by token string, tokens that models added are taken over"
    )
    allow_pickle: bool = False

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        """A model may be given by its reference alone."""
        if isinstance(raw, dict) and isinstance(raw.get("models"), list):
            models = [{"reference": item} if isinstance(item, str) else item for item in raw["models"]]
            return {**raw, "models": models}
        return raw
