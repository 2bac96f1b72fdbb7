"""`resafe` with FSDP2 over gloo: a process of `test_hardware.py`'s two, with accelerate's own sharding and saving.

accelerate shards on accelerators only: of processes on CPUs it makes DDP, whatever the environment asks for. The two
places where it decides so are changed here, and nothing else.
"""

from __future__ import annotations

import sys
from typing import Any

import accelerate.accelerator as accelerator
import accelerate.state as state
from accelerate.utils import DistributedType

sharded: list[Any] = []
plain, prepare = state.AcceleratorState.__init__, accelerator.fsdp2_prepare_model


def init(self: Any, *args: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
    """As accelerate's on GPUs: with a plugin the processes are FSDP's."""
    plain(self, *args, fsdp_plugin=fsdp_plugin, **settings)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # a second state takes it from here


def prepared(*args: Any) -> Any:
    """Keeps what was sharded."""
    sharded.append(prepare(*args))
    return sharded[-1]


if __name__ == "__main__":
    state.AcceleratorState.__init__ = init
    accelerator.fsdp2_prepare_model = prepared
    from torch.distributed.tensor import DTensor

    from resafe.cli import main

    sys.argv[0] = "resafe"
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    if not code and not (sharded and all(isinstance(weight, DTensor) for weight in sharded[0].parameters())):
        sys.exit("the model was not sharded")
    sys.exit(code)
