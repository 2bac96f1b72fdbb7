"""Where a mask's training stands: its logits and its optimiser's moments, on disk and back, for one process or many.

One process writes one safetensors file; several write their shards together (torch's distributed checkpoint). Either
can be read by any number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resafe.masks.checkpoint import load_state, save_state
from resafe.masks.logits import MaskLogits, assign, sharded
from resafe.masks.processes import Processes

_FILE, _SHARDED, _DONE = "checkpoint.safetensors", "checkpoint-", "resafe.json"


def save_training(
    work: Path, step: int, logits: MaskLogits, optimizer: torch.optim.Optimizer, identity: str, processes: Processes
) -> None:
    """Writes the state after `step` steps; what was there before stays until the new one is whole."""
    state: dict[str, Tensor] = {}
    for key, parameter in logits.values.items():
        state[f"logits/{key}"] = parameter.detach()
        # a layer that no batch has reached yet (an expert, say) has no moments
        for moment, value in optimizer.state[parameter].items():
            state |= {f"{name}/{key}": part for name, part in _plain(moment, value).items()}
    if processes.world == 1:
        save_state(work / _FILE, {"step": torch.tensor(step), **state}, identity)
        return
    from torch.distributed.checkpoint.state_dict_saver import save

    place = work / f"{_SHARDED}{step}"
    if processes.main:
        shutil.rmtree(place, ignore_errors=True)
    processes.wait()
    save(state, checkpoint_id=place)
    processes.wait()
    if processes.main:
        partial = place / (_DONE + ".partial")
        partial.write_text(json.dumps({"step": step, "identity": identity, "names": sorted(state)}))
        os.replace(partial, place / _DONE)  # now it counts
        for other in work.glob(f"{_SHARDED}*"):
            if other != place:
                shutil.rmtree(other, ignore_errors=True)
    processes.wait()


def load_training(
    work: Path, logits: MaskLogits, optimizer: torch.optim.Optimizer, identity: str, processes: Processes
) -> int:
    """Takes over the latest state of this training; returns the steps that were done, 0 if there is none."""
    processes.wait()
    file = load_state(work / _FILE, identity) or {}
    place, sharded = _latest(work, identity)
    done = int(file.get("step", torch.tensor(0)))
    if max(done, sharded) == 0:
        return 0
    if done >= sharded:
        _take(logits, optimizer, file)
        return done
    assert place is not None
    _load_sharded(place, logits, optimizer)
    return sharded


def _plain(moment: str, value: Any) -> dict[str, Tensor]:
    """The plain tensors of a moment: itself, or the parts of one in eight bits."""
    if sharded(value) or not hasattr(value, "__tensor_flatten__"):
        return {moment: value}
    parts, _ = value.__tensor_flatten__()
    return {f"{moment}.{part}": getattr(value, part) for part in parts}


def _latest(work: Path, identity: str) -> tuple[Path | None, int]:
    best: tuple[Path | None, int] = (None, 0)
    for done in work.glob(f"{_SHARDED}*/{_DONE}"):
        described = json.loads(done.read_text())
        if described["identity"] == identity and described["step"] > best[1]:
            best = (done.parent, int(described["step"]))
    return best


def _take(logits: MaskLogits, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    if any(name.startswith("exp_avg.codes/") for name in state):
        _make_moments(optimizer)
    for key, parameter in logits.values.items():
        assign(parameter, state[f"logits/{key}"])
        if f"step/{key}" not in state:
            continue
        if f"exp_avg/{key}" in state:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            for name, moment in moments.items():
                assign(moment, state[f"{name}/{key}"])
            optimizer.state[parameter] = {"step": state[f"step/{key}"], **moments}
            continue
        for moment, value in optimizer.state[parameter].items():
            for name, part in _plain(moment, value).items():
                part.copy_(state[f"{name}/{key}"])


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Has the optimiser make its state, by a step of size and gradient zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        set_rate(group, 0.0)
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        set_rate(group, float(rate))


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Sets the learning rate of an optimiser's group, which compiled optimisers hold as a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _load_sharded(place: Path, logits: MaskLogits, optimizer: torch.optim.Optimizer) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    names = set(json.loads((place / _DONE).read_text())["names"])
    state: dict[str, Tensor] = {}
    for key, parameter in logits.values.items():
        state[f"logits/{key}"] = torch.zeros_like(parameter.detach())
        if f"step/{key}" in names:
            state |= {f"{moment}/{key}": torch.zeros_like(parameter.detach()) for moment in ("exp_avg", "exp_avg_sq")}
            state[f"step/{key}"] = torch.zeros(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process alone reads it
        load(state, checkpoint_id=place)
    for key, parameter in logits.values.items():
        with torch.no_grad():
            parameter.copy_(state[f"logits/{key}"])
        if f"step/{key}" in names:
            optimizer.state[parameter] = {name: state[f"{name}/{key}"] for name in ("step", "exp_avg", "exp_avg_sq")}
