"""Task vectors: what fine-tuning changed. One protocol over full weights, adapter factors and low-rank products."""

from resafe.deltas.base import TaskVector
from resafe.deltas.full import DifferenceVector
from resafe.deltas.lora import LoraProductVector
from resafe.deltas.merged import MergedVector, merged_model
from resafe.deltas.pick import Space, check_together, origins, stored_copies, task_vector, task_vectors

__all__ = [
    "DifferenceVector",
    "LoraProductVector",
    "MergedVector",
    "Space",
    "TaskVector",
    "check_together",
    "merged_model",
    "origins",
    "stored_copies",
    "task_vector",
    "task_vectors",
]
