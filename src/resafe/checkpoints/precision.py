"""Where models are put, and which number format frozen weights have there. Knows machines, no model."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from resafe.errors import InputError

Precision = Literal["auto", "float32", "bfloat16"]

_FAST = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16", "sve_bf16")  # products of bfloat16 in hardware


def resolve_dtype(precision: Precision, device: str | torch.device = "cpu") -> torch.dtype:
    """The dtype that a precision stands for on a device.

    "auto" is bfloat16 where the hardware multiplies it, else float32. It asks what the processor can do and times
    nothing, so that a machine always gives the same answer and with it the same results; `benchmarks/precision.py`
    measures what the answer is worth.

    Args:
        precision: "auto", "float32" or "bfloat16".
        device: Where the weights will be.

    Raises:
        InputError: Another precision.
    """
    if precision not in get_args(Precision):
        raise InputError(f"no precision '{precision}'", f"give one of {', '.join(get_args(Precision))}")
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    fast = torch.cuda.is_bf16_supported() if torch.device(device).type == "cuda" else _cpu_multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def resolve_device(device: str) -> str:
    """The device that "auto", "cpu" or "cuda" stands for here: "cpu" or "cuda".

    Raises:
        InputError: CUDA is asked for and there is none, or something that is no device.
    """
    if device != "auto":
        try:
            torch.device(device)
        except RuntimeError:
            raise InputError(f"there is no device '{device}'", "use device: auto, cpu or cuda") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, and this machine has none", "use device: auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return any(found.get(name, False) for name in _FAST)
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch before 2.11 has nothing public
    return bool(known and known())
