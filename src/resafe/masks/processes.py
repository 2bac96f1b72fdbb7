"""Mask training by several processes (`torchrun`): FSDP2 shards the masked model, every process takes rows of a batch.

A batch is cut into the same forward passes everywhere, so that all processes gather the same parameters in the same
order; of each pass every process computes its share of the rows. Log-probabilities are then exchanged, so that every
process knows the whole batch's loss and metrics, and backpropagates through its own rows. The gradients of all
processes together are those of one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from resafe.errors import InputError
from resafe.masks.logits import MaskLogits
from resafe.masks.modules import MaskedWeight


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: Its number.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def rows(self, rows: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], bool]:
        """The rows of a forward pass that are this process's, and whether they count.

        Long and short ones are dealt out evenly. A process without a row takes part with one that does not count, as
        the parameters of a layer are gathered by all processes together.
        """
        if self.world == 1:
            return list(rows), True
        own = sorted(rows, key=lambda row: lengths[row])[self.rank :: self.world]
        return (sorted(own), True) if own else ([rows[0]], False)

    def everywhere(self, own: Tensor) -> Tensor:
        """The sum over all processes, through which gradients flow into what this process computed alone."""
        if self.world == 1:
            return own
        total = own.detach().clone()
        distributed.all_reduce(total)
        return total + (own - own.detach())

    def agree(self, flag: bool) -> bool:
        """Whether it holds in every process."""
        if self.world == 1:
            return flag
        votes = torch.tensor([float(flag)], device=_device())
        distributed.all_reduce(votes)
        return int(votes.item()) == self.world

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            distributed.barrier()


ALONE = Processes()


def _device() -> torch.device:
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def launched() -> Processes:
    """This process among those that `torchrun` started; they are connected at the first call.

    Raises:
        InputError: A launcher said that there are several, and not how they reach each other.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    if not distributed.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise InputError(
                f"WORLD_SIZE is {world}, and MASTER_ADDR is not set",
                "start with torchrun --nproc-per-node N -m resafe …",
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Processes(distributed.get_rank(), world)


def leave() -> None:
    """Disconnects from the other processes, if there are any; for programs that end now."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer: the modules that its class says not to split, else the longest list of modules.

    Raises:
        InputError: It has neither.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in kinds]
    if found:
        return found
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError("the model has no list of layers", "several processes and checkpointing need one")
    return list(sorted(lists, key=len)[-1])


def shard(model: Any, logits: MaskLogits) -> None:
    """Shards a masked model over all processes, in place: its layers one by one, then what is left.

    Each part moves to this process's device whole, with its buffers, and leaves only its shard there before the next
    one comes. So a model on the CPU need not fit a device.

    Args:
        model: The model with masks installed; every process has the same one.
        logits: Its logits; they hold the shards afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(_device().type, (distributed.get_world_size(),))
    layers = blocks(model)
    owner = {m.name: layer for layer in layers for m in layer.modules() if isinstance(m, MaskedWeight)}
    for part in (*layers, model):
        fully_shard(part, mesh=mesh)
        # At once: the logits would hold on to the whole parameters that have just moved to the device.
        weights = [m for m in part.modules() if isinstance(m, MaskedWeight)]
        logits.rebind({key: value for m in weights for key, value in zip(m.keys(), m.logits, strict=True)})
    gathered: list[Any] = []

    def inside(name: str | None) -> None:
        """Before a weight is read outside the forward: gathers its layer, and gives back the one before."""
        layer: Any = None if name is None else owner.get(name, model)
        if gathered and gathered[0] is not layer:
            gathered.pop().reshard()
        if layer is not None and not gathered:
            layer.unshard()
            gathered.append(layer)

    logits.read_inside(inside)
