"""A checkpoint as the arguments of lm-eval's vLLM class. Knows nothing of vLLM itself."""

from __future__ import annotations

from typing import Any

from resafe.checkpoints.loading import tokenizer_directory
from resafe.checkpoints.reader import Checkpoint
from resafe.errors import InputError


def vllm_arguments(checkpoint: Checkpoint, dtype: str = "auto") -> dict[str, Any]:
    """What lm-eval's vLLM class is made with: a model by its directory, an adapter on its base by both.

    Raises:
        InputError: An adapter without a base.
    """
    if checkpoint.kind == "model":
        return {"pretrained": str(checkpoint.downloaded()), "dtype": dtype}
    if checkpoint.base is None:
        raise InputError(
            f"{checkpoint.reference}: the adapter names no base", f"open it as BASE+{checkpoint.reference}"
        )
    return {
        "pretrained": str(checkpoint.base.downloaded()),
        "tokenizer": str(tokenizer_directory(checkpoint)),
        "lora_local_path": str(checkpoint.downloaded()),
        "max_lora_rank": _rank(int(checkpoint.config.get("r", 8))),
        "dtype": dtype,
    }


def _rank(rank: int) -> int:
    """VLLM takes certain ranks only: the next one up."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
