"""Task vectors: what fine-tuning changed. One protocol over full weights, adapter factors and low-rank products."""

from resafe.deltas.base import TaskVector
from resafe.deltas.full import DifferenceVector
from resafe.deltas.lora import LoraProductVector
from resafe.deltas.pick import Space, check_together, origins, stored_copies, task_vector

__all__ = [
    "DifferenceVector",
    "LoraProductVector",
    "Space",
    "TaskVector",
    "check_together",
    "origins",
    "stored_copies",
    "task_vector",
]
