"""Guard models from checkpoints. A language model loads as any other; classifiers need their heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from resafe.checkpoints import Checkpoint, Precision, load_model, load_tokenizer, open_checkpoint, quiet, resolve_dtype
from resafe.checkpoints.precision import resolve_device
from resafe.errors import InputError
from resafe.evals.guards.families import Output


@dataclass(frozen=True)
class Loaded:
    """A guard in memory: its model, its head if it is a classifier, the head's labels, its tokenizer and window."""

    model: Any
    tokenizer: Any
    window: int
    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    labels: tuple[str, ...] = ()


def load_guard(reference: str, output: Output, dtype: Precision, device: str, allow_pickle: bool = False) -> Loaded:
    """Opens a guard's checkpoint and puts it on a device ("auto" is CUDA where there is one).

    Raises:
        InputError: No such checkpoint, or it is not what its family's weights are.
    """
    place = resolve_device(device)
    checkpoint = open_checkpoint(reference, allow_pickle=allow_pickle)
    tokenizer = load_tokenizer(checkpoint)
    if output in ("text", "first-token"):
        model: Any = load_model(checkpoint, dtype=dtype, device=place)
        return Loaded(model, tokenizer, _window(model, tokenizer))
    kind = resolve_dtype(dtype, place)
    body = _body(checkpoint, kind).to(place)
    name = "score" if output == "labels" else "score_head"
    weight, bias = _head(checkpoint, name, body.config, output)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(
            hidden.float(), weight.to(hidden.device), None if bias is None else bias.to(hidden.device)
        )

    raw = {int(number): label for number, label in (checkpoint.config.get("id2label") or {}).items()}
    labels = tuple(str(raw.get(number, f"label {number}")) for number in range(weight.shape[0]))
    return Loaded(body, tokenizer, _window(body, tokenizer), head, labels)


def _body(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The transformer without a head."""
    from transformers import AutoModel

    directory = checkpoint.downloaded()
    with quiet():
        try:
            loaded: Any = AutoModel.from_pretrained(
                directory, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise InputError(f"{directory}: cannot be loaded ({str(error).splitlines()[0]})", "") from error
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise InputError(f"{directory}: lacks tensors: {', '.join(missing[:10])}", "download it again")
    return model.eval()


def _head(checkpoint: Checkpoint, name: str, config: Any, output: Output) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (outputs, width) and bias of a head, in float32.

    Raises:
        InputError: The checkpoint has none of that name, or one that this family does not have.
    """
    tensors = checkpoint.tensors
    if f"{name}.weight" not in tensors:
        raise InputError(
            f"{checkpoint.reference}: has no tensor {name}.weight, so it is not a guard of this family",
            "check the model and its family",
        )
    if output == "cost" and getattr(config, "do_normalize", False):
        raise InputError(f"{checkpoint.reference}: its cost is normalised, which is not supported", "")
    weight = checkpoint.read(f"{name}.weight").float()
    bias = checkpoint.read(f"{name}.bias").float() if f"{name}.bias" in tensors else None
    if output == "cost" and weight.shape[0] != 1:
        raise InputError(f"{checkpoint.reference}: a cost is one number, its head has {weight.shape[0]}", "")
    return weight, bias


def _window(model: Any, tokenizer: Any) -> int:
    """Most tokens the guard reads."""
    configured = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return min(int(configured), int(tokenizer.model_max_length))
