"""Responses that people labelled: the published sets by name, and a user's own file."""

from resafe.evals.labelled.rows import Labelled, overlap_key, read_labelled, without_prompts
from resafe.evals.labelled.sets import CALIBRATION, SETS, load_labelled

__all__ = [
    "CALIBRATION",
    "SETS",
    "Labelled",
    "load_labelled",
    "overlap_key",
    "read_labelled",
    "without_prompts",
]
