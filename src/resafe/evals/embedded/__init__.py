"""A judge that is trained in place on labelled rows and runs on the CPU in seconds."""

from resafe.evals.embedded.heads import Head, cross_validated, fit_head
from resafe.evals.embedded.judge import Embedded, default_place
from resafe.evals.embedded.local import LocalModel
from resafe.evals.embedded.trained import TrainedJudge, prompts_of, read_trained, write_trained
from resafe.evals.embedded.training import TrainingResult, train_judge

__all__ = [
    "Embedded",
    "Head",
    "LocalModel",
    "TrainedJudge",
    "TrainingResult",
    "cross_validated",
    "default_place",
    "fit_head",
    "prompts_of",
    "read_trained",
    "train_judge",
    "write_trained",
]
