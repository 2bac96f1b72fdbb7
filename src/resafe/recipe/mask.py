"""The schema of a mask file's recipe: which models, which data, which settings of SOMF. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from resafe.recipe.schema import FusionPart, Part


class MaskRecipe(Part):
    """The training of a mask."""

    aligned: str = Field(description="the aligned checkpoint: path, org/name, base+adapter, file.gguf")
    tuned: list[str] = Field(min_length=1, description="tuned checkpoints, which share the mask")
    out: Path | None = Field(default=None, description="directory to write; or give --out")
    fusion: FusionPart = FusionPart()
    settings: dict[str, Any] = Field(default={}, description="of the method somf: preset, granularity, loss, steps, …")
    pairs: str = Field(default="embedded", description="safety pairs: embedded, a set, a Hub id or a file")
    harmless: str = Field(default="embedded", description="harmless requests with answers")
    keep: str | list[str] | None = Field(
        default=None, description="task examples to keep: a set, a Hub id or a file, or one for each tuned model"
    )
    keep_limit: int = Field(default=256, ge=1, description="the first so many of each are taken")
    data_dir: Path | None = Field(default=None, description="directory with the files of public sets; null: the Hub")
    max_bad_share: float = Field(default=0.01, ge=0, le=1, description="refuse a set of which more rows are unusable")
    space: Literal["auto", "factors", "weights"] = Field(default="auto", description="for adapters")
    system: str | None = Field(default=None, description="system turn of the prompts; null: the template's own")
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    allow_pickle: bool = False
