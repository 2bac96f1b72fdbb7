"""TRL's trainers with what this project needs changed, and the arguments both get. Importing this loads TRL.

Changed: a fixed order of the data, no model cards, no usage reports over the network, no operation counts, and for DPO
reference log-probabilities computed once in batches of similar length. Knows nothing of where results are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from resafe.checkpoints.precision import resolve_device
from resafe.errors import InputError
from resafe.registry import nearest
from resafe.training.adapters import is_adapter
from resafe.training.head import install
from resafe.training.order import FixedOrder
from resafe.training.settings import DpoSettings, SftSettings, TrainSettings


class _Quiet:
    """Mixed into a TRL trainer: what is switched off, and the order of the data."""

    order: Sequence[int] = ()

    def _send_telemetry(self) -> None:
        """Nothing about a run leaves the machine."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Cards are written with the result, not with every checkpoint."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it walks all modules at every step."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return FixedOrder(self.order)


class AnswerSftTrainer(_Quiet, SFTTrainer):
    """SFT on rows of `input_ids` and `labels`."""


class CachedDpoTrainer(_Quiet, DPOTrainer):
    """DPO on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, with the reference computed before training."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        model: Any = self.model
        reference: Any = self.compute_ref_log_probs
        install(_inner(model))  # TRL has just put its own path there; this one goes on top
        columns = [dataset[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
        lengths = [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]
        ranked = sorted(range(len(lengths)), key=lambda index: lengths[index])
        chosen, rejected = [0.0] * len(lengths), [0.0] * len(lengths)
        model.eval()
        for start in range(0, len(ranked), batch_size):
            picked = ranked[start : start + batch_size]
            batch = self._prepare_inputs(self.data_collator([dataset[index] for index in picked]))
            better, worse = reference(model, batch)
            for index, first, second in zip(picked, better.tolist(), worse.tolist(), strict=True):
                chosen[index], rejected[index] = first, second
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)


def check_trackers(names: Sequence[str]) -> None:
    """Raises InputError for a tracker that transformers does not know, or whose package is not installed."""
    from transformers.integrations import integration_utils as known

    installed: Callable[[], list[str]] = known.get_available_reporting_integrations
    every = sorted(known.INTEGRATION_TO_CALLBACK)
    for name in names:
        if name in ("all", "none"):
            if len(names) > 1:
                raise InputError(f"the tracker '{name}' beside others", f"give {name} alone, or leave it out")
        elif name not in every:
            raise InputError(f"there is no tracker '{name}'", nearest(name, every))
        elif name != "flyte" and name not in installed():  # that one is never listed
            raise InputError(f"the package of the tracker '{name}' is not installed", "install it, or leave it out")


def _inner(model: Any) -> Any:
    return model.get_base_model() if is_adapter(model) else model


def _any_bfloat16(model: Any) -> bool:
    return any(weight.dtype == torch.bfloat16 for weight in model.parameters())


def _arguments(model: Any, settings: TrainSettings, work: Path, steps: int) -> dict[str, Any]:
    device = resolve_device(settings.device)
    micro = settings.micro_batch_size or settings.batch_size
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if (settings.batch_size // micro) % processes:
        raise InputError(
            f"a batch of {settings.batch_size} in forward passes of {micro} cannot be shared by {processes} processes",
            "set micro_batch_size so that batch_size / micro_batch_size is a multiple of the processes",
        )
    return {
        "output_dir": str(work),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // micro // processes,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": min(settings.warmup_steps, steps // 2),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cpu": device == "cpu",
        # Frozen bfloat16 weights: autocast, so that the adapter's own products are in bfloat16 too, its weights not.
        "bf16": settings.autocast == "bfloat16"
        or (settings.autocast == "auto" and (device == "cuda" or _any_bfloat16(model))),
        "fp16": False,
        "seed": settings.seed,
        "logging_steps": 1,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or steps,
        "save_total_limit": 2,  # one could be cut short while the other is still there
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": device == "cuda",
        "max_length": None,  # rows come truncated
    }


def sft_trainer(
    model: Any, tokenizer: Any, rows: Any, settings: SftSettings, work: Path, order: Sequence[int], callback: Any
) -> Any:
    """An SFT trainer over prepared rows; `order` holds the examples of all steps."""
    arguments = _arguments(model, settings, work, len(order) // settings.batch_size)
    config = SFTConfig(**arguments, padding_free=settings.packing, dataset_kwargs={"skip_prepare_dataset": True})
    return _build(AnswerSftTrainer, config, model, tokenizer, rows, order, callback)


def dpo_trainer(
    model: Any, tokenizer: Any, rows: Any, settings: DpoSettings, work: Path, order: Sequence[int], callback: Any
) -> Any:
    """A DPO trainer over prepared rows; its reference is the model as given."""
    arguments = _arguments(model, settings, work, len(order) // settings.batch_size)
    config = DPOConfig(**arguments, beta=settings.beta, loss_type=["sigmoid"], precompute_ref_log_probs=True)
    return _build(CachedDpoTrainer, config, model, tokenizer, rows, order, callback)


def _build(
    trainer_class: Callable[..., Any],
    config: Any,
    model: Any,
    tokenizer: Any,
    rows: Any,
    order: Sequence[int],
    callback: Any,
) -> Any:
    config._n_gpu = min(config.n_gpu, 1)  # one process uses one GPU; more need a launcher
    trainer = trainer_class(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.order = order
    if trainer_class is AnswerSftTrainer:
        install(_inner(model))
    trainer.remove_callback(PrinterCallback)
    return trainer
