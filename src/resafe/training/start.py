"""The model that a training verb starts from: an adapter to continue, a model in float32 or bfloat16, or in 4 bits."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from resafe.checkpoints import Checkpoint, Precision, load_model, resolve_dtype
from resafe.errors import InputError


def start_model(
    checkpoint: Checkpoint, *, full: bool, device: str, dtype: Precision = "auto", four_bit: bool = False
) -> Any:
    """Loads the model to train.

    Args:
        checkpoint: A model, or an adapter, which is kept as an adapter unless all weights are to be trained.
        full: All weights will be trained: they are kept in float32, as steps of 1e-5 vanish in bfloat16.
        device: "cpu" or "cuda".
        dtype: Precision of frozen weights.
        four_bit: Load the frozen weights in 4 bits (NF4) with bitsandbytes, as in QLoRA (arXiv:2305.14314).

    Raises:
        InputError: 4 bits without CUDA or bitsandbytes, or for all weights; an adapter that names no base.
    """
    if four_bit:
        check_four_bit(device, full)
        return _four_bit(checkpoint)
    return load_model(checkpoint, dtype="float32" if full else dtype, device=device, merge=full)


def autocast_for(device: str, dtype: Precision) -> str:
    """The `autocast` setting over weights in float32: bfloat16 products where the hardware has them."""
    return "bfloat16" if resolve_dtype(dtype, device) == torch.bfloat16 else "off"


def check_four_bit(device: str, full: bool) -> None:
    """Raises InputError where a model cannot be trained over a 4-bit base."""
    if full:
        raise InputError("weights in 4 bits cannot be trained", "leave out --full, or leave out --four-bit")
    if device != "cuda":
        raise InputError("a base in 4 bits needs CUDA, and this run is on the CPU", "leave out --four-bit")
    if find_spec("bitsandbytes") is None:
        raise InputError("a base in 4 bits needs the package bitsandbytes", "pip install bitsandbytes")


def _four_bit(checkpoint: Checkpoint) -> Any:
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from resafe.training.work import processes

    base = checkpoint if checkpoint.kind == "model" else checkpoint.base
    if base is None:
        raise InputError(f"{checkpoint.reference}: the adapter names no base", "open it as BASE+ADAPTER")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(
        base.downloaded(),
        quantization_config=config,
        local_files_only=True,
        trust_remote_code=False,
        device_map={"": processes().local_process_index},  # of several processes each has a GPU of its own
    )
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    if checkpoint.kind == "adapter":
        return PeftModel.from_pretrained(prepared, str(checkpoint.downloaded()), is_trainable=True)
    return prepared
