"""Figures of a training to trackers (tensorboard, wandb, trackio, mlflow, …), by transformers' integrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resafe.errors import InputError


class Trackers:
    """What reports to trackers.

    Args:
        names: As transformers and TRL name them in `report_to`.
        directory: Where those that write files write.
        facts: Settings to show with the run.
        steps: Steps of the run.
        main: Whether this process is the one that reports.

    Raises:
        InputError: A tracker is unknown, or its package is not installed.
    """

    def __init__(
        self, names: Sequence[str], directory: Path, facts: Mapping[str, Any], steps: int, main: bool = True
    ) -> None:
        self._callbacks: list[Any] = []
        if not names:
            return
        try:
            from transformers import TrainerControl, TrainerState, TrainingArguments
            from transformers.integrations import integration_utils

            made: Any = integration_utils
            self._callbacks = [make() for make in made.get_reporting_integration_callbacks(list(names))]
            self._arguments = TrainingArguments(
                output_dir=str(directory), report_to=[], use_cpu=True, run_name=directory.name
            )
        except (ValueError, RuntimeError, ImportError) as error:
            text = str(error).strip().splitlines()[0]
            raise InputError(
                f"report_to {', '.join(names)}: {text}", "install that tracker's package, or name another one"
            ) from None
        self._state, self._control = TrainerState(max_steps=steps, is_world_process_zero=main), TrainerControl()
        for callback in self._callbacks:
            callback.on_train_begin(self._arguments, self._state, self._control, model=_Described(facts))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Reports the figures of a step."""
        for callback in self._callbacks:
            self._state.global_step = step
            callback.on_log(self._arguments, self._state, self._control, logs=dict(figures), model=None)

    def close(self) -> None:
        """Ends the run."""
        for callback in self._callbacks:
            callback.on_train_end(self._arguments, self._state, self._control, model=None)


class _Described:
    """Stands for the model, of which trackers show the configuration."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.config = _Config(facts)


class _Config(dict[str, Any]):
    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        import json

        return json.dumps(self, default=str)
