"""Which weights of a model train, and how the result is written. Knows PEFT, no loss and no data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from resafe.checkpoints import staged
from resafe.errors import InputError
from resafe.training.settings import LoraSettings


def is_adapter(model: Any) -> bool:
    """Whether the model is wrapped by PEFT."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def with_trainable(model: Any, lora: LoraSettings | None, seed: int) -> Any:
    """The model to train: with a fresh LoRA, with its own adapter made trainable, or whole.

    A fresh adapter depends on the seed and the model's module names and shapes only; the caller's random state is
    left as it was.

    Args:
        model: A causal language model or a PeftModel.
        lora: Settings of a fresh adapter; None continues the model's adapter, or trains all weights if it has none.
        seed: Seed of the fresh adapter's A matrices (its B matrices are zero).

    Raises:
        InputError: A fresh adapter was asked for on a model that already has one; the adapter is not called
            "default"; a target module does not exist.
    """
    if not is_adapter(model):
        if lora is not None:
            return _fresh(model, lora, seed)
        model.requires_grad_(True)
        return model
    if lora is not None:
        raise InputError(
            "a fresh LoRA adapter was asked for on a model that already has an adapter",
            "merge the adapter into the weights first, or leave out the LoRA settings to continue it",
        )
    if list(model.peft_config) != ["default"]:
        raise InputError(f"cannot continue the adapters {list(model.peft_config)}", "load a single adapter")
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".default." in name or name.endswith(".default"):
            parameter.requires_grad_(True)
    model.peft_config["default"].inference_mode = False
    return model


def _fresh(model: Any, lora: LoraSettings, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except (ValueError, re.error) as error:
            raise InputError(f"no LoRA adapter fits the model: {error}", "check the target module names") from error


def tied_names(model: Any) -> frozenset[str]:
    """Names of parameters that are another one under a second name (a tied output layer); its first name is kept."""
    first = {name for name, _ in model.named_parameters()}
    return frozenset(name for name, _ in model.named_parameters(remove_duplicate=False) if name not in first)


def write_result(
    model: Any,
    tokenizer: Any,
    out: Path,
    card: str,
    files: Mapping[str, str] | None = None,
    weights: dict[str, Any] | None = None,
) -> None:
    """Writes an adapter (without tokenizer) or a whole model (with it) to `out` in one move, replacing what is there.

    The files' bytes depend on the weights and settings only: lists in the adapter's config are sorted, as PEFT
    writes sets in an order that changes from process to process.

    Args:
        model: What was trained.
        tokenizer: Its tokenizer.
        out: The directory.
        card: Text of its README.md.
        files: More text files, by name.
        weights: The state dict, where the model holds only a shard of it.

    Raises:
        InputError: `out` holds something that resafe did not write.
    """
    with staged(out) as staging:
        if is_adapter(model):
            model.save_pretrained(staging, safe_serialization=True, save_embedding_layers=False, state_dict=weights)
            config_file = staging / "adapter_config.json"
            config = json.loads(config_file.read_text(encoding="utf-8"))
            ordered = {key: sorted(value) if _is_names(value) else value for key, value in config.items()}
            config_file.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        else:
            model.save_pretrained(staging, safe_serialization=True, state_dict=weights)
            tokenizer.save_pretrained(staging)
        for name, text in {"README.md": card, **(files or {})}.items():
            (staging / name).write_text(text, encoding="utf-8")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
