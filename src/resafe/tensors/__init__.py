"""Pure functions, tensor in, tensor out. Nothing here knows of files, models or methods."""

from resafe.tensors.combine import weighted_sum
from resafe.tensors.random import bernoulli, shuffled, uniform
from resafe.tensors.select import keep_top, trimmed
from resafe.tensors.sign import agreeing_mean, agreeing_sum, elect_sign

__all__ = [
    "agreeing_mean",
    "agreeing_sum",
    "bernoulli",
    "elect_sign",
    "keep_top",
    "shuffled",
    "trimmed",
    "uniform",
    "weighted_sum",
]
