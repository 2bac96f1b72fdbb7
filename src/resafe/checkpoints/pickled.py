"""Pickled weights (`*.bin`): read only when the user allows it, and then only as tensors, never as code."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from resafe.checkpoints.header import TensorInfo
from resafe.checkpoints.storage import File
from resafe.errors import InputError


def refuse_pickle(path: File) -> InputError:
    """The error for weights that exist only as a pickle."""
    return InputError(
        f"{path}: pickled weights can run code when they are loaded, and this checkpoint has no safetensors",
        "ask for a safetensors version, or allow pickles (allow_pickle) if you trust its source",
    )


def load_pickle(path: Path) -> tuple[dict[str, TensorInfo], dict[str, torch.Tensor]]:
    """Loads a pickled state dict with `weights_only`, so that nothing but tensors and plain values is built.

    Returns:
        What each tensor is (its offset unknown, -1), and the tensors.

    Raises:
        InputError: The file is damaged, holds more than plain data, or is not a map of names to tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: cannot be read as plain weights ({reason})", "ask for a safetensors version of this checkpoint"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path}: is not a map of names to tensors", "save the model's state_dict, or use safetensors")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{path}: {name!r} is not a tensor", "save the model's state_dict, or use safetensors")
    infos = {
        name: TensorInfo(name, value.dtype, tuple(value.shape), value.numel() * value.element_size(), path, -1)
        for name, value in state.items()
    }
    return infos, state
