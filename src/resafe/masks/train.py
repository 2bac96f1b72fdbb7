"""The training loop of a mask: only the logits learn. Resumes from its last checkpoint; knows nothing of recipes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resafe.allocator import LARGE, freed_memory_kept
from resafe.errors import InputError, ResafeError
from resafe.masks.batches import Batches, Item
from resafe.masks.budget import LayerBudget, budget_of, hold_budget
from resafe.masks.engine import EngineSettings, make_optimizer, step_alone
from resafe.masks.fused import Kernels
from resafe.masks.logits import MaskLogits, held_here, whole
from resafe.masks.losses import (
    AVERAGED,
    PAIR_LOSSES,
    SMOOTHED,
    UNPADDED,
    LossName,
    answer_log_probabilities,
    answer_logits,
    length_groups,
    preference_loss,
    token_divergence,
)
from resafe.masks.padding import check_padding
from resafe.masks.pairs import shares_prompts
from resafe.masks.processes import ALONE, Processes
from resafe.masks.reference import (
    Reference,
    both_log_probabilities,
    kept_reference,
    pass_cost,
    precision_of,
    reference_digest,
    reference_log_probabilities,
)
from resafe.masks.state import load_training, save_training, set_rate
from resafe.masks.teachers import Teachers
from resafe.masks.trackers import Trackers
from resafe.provenance import LATER, described, digest_value

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainSettings:
    """How a mask is trained.

    Attributes:
        loss: "sft" raises the chosen answers' likelihood; "distill" lowers KL(π_aligned ‖ π) on the chosen answers of
            pairs and KL(π_tuned ‖ π) on those of task examples, so that the mask learns what each model does there, its
            doubts included, and not the labels; the others are preference losses on the pairs.
        steps: Optimiser steps.
        learning_rate: Peak learning rate of AdamW on the logits.
        warmup_steps: Linear warm-up, then cosine decay to zero.
        batch_size: Items (pairs or examples) a step.
        beta: β of DPO.
        reference: π_ref of DPO.
        shares: Composition of a batch by side.
        removal_price: Weight of mean(1 − m), which keeps the mask from removing what it need not.
        task_divergence: Weight of KL(π_tuned ‖ π) on the answers of a batch's task examples, which keeps what the tuned
            model does there, its doubts included; the task's own loss counts beside it.
        label_smoothing: Share of the pairs that are taken to be labelled wrongly, for "robust", "exo_pair" and "aot".
        max_norm: Gradient clipping; 0 for none.
        seed: Seed of batches and draws.
        layer_budget: What of each layer is kept at least (see `resafe.masks.budget`); None for no such bound.
    """

    loss: LossName = "sft"
    steps: int = 40
    learning_rate: float = 0.1
    warmup_steps: int = 4
    batch_size: int = 16
    beta: float = 0.1
    reference: Reference = "tuned"
    shares: dict[str, float] = field(default_factory=lambda: {"safety": 0.4, "harmless": 0.4, "task": 0.2})
    removal_price: float = 0.0
    task_divergence: float = 0.0
    label_smoothing: float = 0.0
    max_norm: float = 0.0
    seed: int = 0
    layer_budget: LayerBudget | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        """Checks ranges, and what depends on each other.

        Raises:
            InputError: A number is out of its range, or "exo_pair" has no ε; or a layer's budget is no keep rate.
        """
        for name, least in (("steps", 0), ("batch_size", 1), ("removal_price", 0), ("task_divergence", 0)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name):g}", f"give {least} or more")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate:g}", "give a number above 0")
        if not all(0 <= share < math.inf for share in self.shares.values()):
            raise InputError(f"shares {self.shares}: a share is no weight", "give numbers from 0 on")
        if self.layer_budget is not None:
            budget_of(None, self.layer_budget)
        if not 0 <= self.label_smoothing < 0.5 or (self.loss == "exo_pair" and self.label_smoothing == 0):
            raise InputError(
                f"label_smoothing is {self.label_smoothing} with loss {self.loss!r}",
                f"it is a share from 0 to below 0.5, used by {', '.join(SMOOTHED)}; exo_pair needs one above 0",
            )


def learning_rate_at(settings: TrainSettings, step: int) -> float:
    """Linear warm-up to the peak, then a half cosine to zero at `steps`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def batches_of(items: Sequence[Item], settings: TrainSettings) -> Batches:
    """The batches of a training, without a model: what cannot be trained on is told before one is loaded.

    Raises:
        InputError: The shares do not fit the items or the size of a batch, or no pair is left for a preference loss.
    """
    batches = Batches(items, settings.batch_size, settings.shares, settings.seed)
    taken = {side for side, count in batches.counts.items() if count}
    if settings.loss in PAIR_LOSSES and not any(item.rejected and item.side in taken for item in items):
        raise InputError(
            f"loss {settings.loss!r} compares the answers of pairs, and there is none in batches of {batches.counts}",
            "give safety or harmless a share, or use the loss sft or distill",
        )
    return batches


class MaskTrainer:
    """Trains the logits of masks that are installed in a model.

    Args:
        model: The model with masks installed (`install_masks`).
        logits: Its logits.
        items: Encoded training items.
        settings: How to train.
        pad_id: Padding token.
        work: Directory for checkpoints; None keeps none.
        progress: Called with (step, steps, metrics) after each step, and with (items, items, {}) while teachers pass.
        checkpoint_every: Steps between checkpoints, and between figures of what each module keeps.
        engine: How training runs: memory, optimiser, trackers.
        processes: This process among those that train together; the model is sharded over them already.
        references: Directory for what the reference's and the teachers' passes gave, which other trainings may share;
            None is `work`.
        models: What tells the models and their fusion from others, for those (see `reference_digest`).
    """

    def __init__(
        self,
        model: Any,
        logits: MaskLogits,
        items: Sequence[Item],
        settings: TrainSettings,
        *,
        pad_id: int,
        work: Path | None = None,
        progress: Progress | None = None,
        checkpoint_every: int = 10,
        engine: EngineSettings | None = None,
        processes: Processes = ALONE,
        references: Path | None = None,
        models: str = "",
    ) -> None:
        self.references, self.models = references or work, models
        self.model, self.logits, self.items, self.settings = model, logits, list(items), settings
        self.pad_id, self.work, self.progress, self.checkpoint_every = pad_id, work, progress, checkpoint_every
        self.batches = batches_of(self.items, settings)
        self.engine, self.processes = engine or EngineSettings(), processes
        self._check_engine()
        check_padding(model, logits, self.items, pad_id, processes)
        logits.kernels = Kernels(self.engine.fused)
        device = next(model.parameters()).device
        self._fused = logits.kernels.used_on(device)  # as planned: that compiling fails is found at the first step
        self._stepping = False
        self.optimizer = make_optimizer(
            self.engine.optimizer, logits.parameters(), settings.learning_rate, self.engine.logits
        )
        if self.engine.step_in_backward:
            for parameter in logits.parameters():
                parameter.register_post_accumulate_grad_hook(self._step_one)  # type: ignore[no-untyped-call]
        self._reference: Tensor | None = None
        self._teachers: Teachers | None = None
        self._shared: bool | None = None
        self._pass_cost = pass_cost(model)
        start = hashlib.sha256()
        for _, parameter in sorted(logits.values.items()):
            start.update(whole(parameter.detach()).cpu().float().numpy().tobytes())
        self._start = start.hexdigest()  # taken now, before training moves the logits
        self._hold_budget()

    def _check_engine(self) -> None:
        engine, several = self.engine, self.processes.world > 1
        if several and engine.optimizer != "adamw":
            raise InputError(
                f"optimizer {engine.optimizer!r} trains in one process", "leave optimizer at adamw, or use one process"
            )
        if several and (engine.logits != "float32" or engine.step_in_backward):
            raise InputError("logits in bfloat16 and step_in_backward are for one process", "leave them out")
        if engine.step_in_backward and self.settings.max_norm > 0:
            raise InputError(
                "step_in_backward frees gradients before their norm is known", "set max_norm to 0, or leave it out"
            )

    def _step_one(self, parameter: torch.nn.Parameter) -> None:
        if self._stepping:  # other gradients (scores) pass through the same logits
            step_alone(self.optimizer, parameter)

    def identity(self) -> str:
        """Digest of all that the training depends on: settings, mask settings, tokens, task vectors, first logits."""
        tokens = [
            (i.side, i.chosen.prompt, i.chosen.answer, i.rejected.answer if i.rejected else ()) for i in self.items
        ]
        start = [self.logits.vectors_digest, self._start]
        running: list[str] = [] if self.engine.optimizer == "adamw" else [self.engine.optimizer]
        running += ["shared prompts"] if self.engine.share_prompts else []
        running += ["logits in bfloat16"] if self.engine.logits == "bfloat16" else []
        running += ["steps in backward"] if self.engine.step_in_backward else []
        running += ["fused"] if self._fused else []
        running += [str([item.task for item in self.items])] if self.logits.apart else []
        running += ["unpadded"] if getattr(self.model, UNPADDED, False) else []
        taught = self.settings.loss == "distill" or self.settings.task_divergence > 0
        running += ["teachers once, all sides in one pass"] if taught else []
        models = [self.models, precision_of(self.model)]
        return digest_value(
            [described(self.settings), described(self.logits.settings), tokens, start, models, *running]
        )

    def reference(self) -> Tensor:
        """The fixed reference's log-probabilities, computed once and kept (see `resafe.masks.reference`)."""
        if self._reference is None:
            which, shared = self.settings.reference, self.shares_prompts()
            self._reference = kept_reference(
                self.references,
                lambda: reference_digest(self.model, self.logits, self.items, which, self.models, shared),
                lambda: reference_log_probabilities(
                    self.model, self.logits, self.items, which, self.pad_id, 32, self.processes, shared
                ),
                self.processes,
            )
        return self._reference

    def teachers(self) -> Teachers:
        """The teachers, who have said once what the run will ask of them (see `resafe.masks.teachers`)."""
        if self._teachers is None:
            self._teachers = Teachers(self.model, self.logits, self.pad_id, self.processes, self.progress)
            met = (item for step in range(self.settings.steps) for item in self.batches.at(step))
            taught = [item for item in met if item.side == "task" or self.settings.loss == "distill"]
            self._teachers.keep(taught, self.references, self.models)
        return self._teachers

    @freed_memory_kept(LARGE)
    def run(self) -> dict[str, float]:
        """Trains from the last checkpoint, or from the start, to the last step; returns the last step's metrics."""
        start, metrics, last = self.resume(), {}, self.settings.steps
        self.model.eval()  # dropout would make the mask's gradient noisier; only masks are random here
        trackers = self._trackers()
        for step in range(start, last):
            metrics = self.step(step)
            due = (step + 1) % self.checkpoint_every == 0
            if due or step + 1 == last:
                metrics |= {f"keep_rate/{module}": kept for module, kept in self.logits.keep_rates().items()}
            trackers.log(step + 1, metrics)
            if self.progress and self.processes.main:
                self.progress(step + 1, last, metrics)
            if self.work and due and step + 1 < last:
                save_training(self.work, step + 1, self.logits, self.optimizer, self.identity(), self.processes)
        trackers.close()
        return metrics

    def _trackers(self) -> Trackers:
        place = self.work or Path("mask.work")
        logs = place.with_name(place.name.removesuffix(".work") + "-logs")
        return Trackers(
            self.engine.report_to, logs, asdict(self.settings), self.settings.steps, main=self.processes.main
        )

    def resume(self) -> int:
        """Goes back to the last checkpoint of this training; returns the steps that were done, 0 without one."""
        if self.work is None:
            return 0
        return load_training(self.work, self.logits, self.optimizer, self.identity(), self.processes)

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step."""
        self.logits.step = step
        for group in self.optimizer.param_groups:
            set_rate(group, learning_rate_at(self.settings, step))
        self.optimizer.zero_grad(set_to_none=True)
        loss, metrics = self.loss(self.batches.at(step))
        with self._rounding(step):
            self._stepping = True
            try:
                # Sharded gradients are averaged over the processes, and each has computed its part of one loss.
                (loss if self.processes.world == 1 else loss * self.processes.world).backward()  # type: ignore[no-untyped-call]
            finally:
                self._stepping = False
            if self.settings.max_norm > 0:
                torch.nn.utils.clip_grad_norm_(self.logits.parameters(), self.settings.max_norm)
            self.optimizer.step()  # what has been stepped in the backward pass has no gradient now
        self._hold_budget()
        found = float(loss.detach())
        if not math.isfinite(found):
            raise ResafeError(
                f"the loss is {found} at step {step + 1}",
                "lower learning_rate, or set max_norm; dtype: float32 helps, too",
            )
        return {"loss": found, **metrics}

    @contextmanager
    def _rounding(self, step: int) -> Iterator[None]:
        """Stochastic rounding that depends on the seed and the step alone, so that a resumed run ends the same."""
        if self.engine.logits == "float32":
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed((self.settings.seed << 32) + step)
            yield

    def _hold_budget(self) -> None:
        if self.settings.layer_budget is not None:
            local = {key: held_here(value.detach()) for key, value in self.logits.values.items()}
            hold_budget(local, self.settings.layer_budget, self.processes.everywhere, self.logits.weights())

    def loss(self, batch: Sequence[Item]) -> tuple[Tensor, dict[str, float]]:
        """The objective on one batch and its metrics, under TRL's names where TRL has one."""
        self.logits.refresh()
        if self.settings.loss == "sft":
            loss, metrics = self._sft(batch)
        elif self.settings.loss == "distill":
            loss, metrics = self._distill(batch)
        else:
            loss, metrics = self._preference(batch)
        if self.settings.removal_price > 0:
            loss = loss + self.settings.removal_price * self._removed_share()
        task = [item for item in batch if item.side == "task"]
        if self.settings.task_divergence > 0 and task:
            divergence = self._divergences(task).sum() / sum(len(item.chosen.answer) for item in task)
            loss = loss + self.settings.task_divergence * divergence
            metrics["kl/task"] = float(divergence.detach())
        return loss, metrics

    def _removed_share(self) -> Tensor:
        share, world = self.logits.removed_share(), self.processes.world
        if world == 1:
            return share
        own = share / world  # the gradients of shards are not averaged here, as those through the model are
        return self.processes.everywhere(share.detach()) + (own - own.detach())

    def _distill(self, batch: Sequence[Item]) -> tuple[Tensor, dict[str, float]]:
        """The divergence an item from the aligned model (pairs) and from the tuned one (task examples).

        Each side's is a mean over its tokens, and the sides count by their numbers of items.
        """
        sides: dict[str, list[int]] = {"pairs": [], "task": []}
        for row, item in enumerate(batch):
            sides["task" if item.side == "task" else "pairs"].append(row)
        sums = self._divergences(batch)
        parts, metrics = [], {}
        for name, rows in sides.items():
            if rows:
                divergence = sums[rows].sum() / sum(len(batch[row].chosen.answer) for row in rows)
                parts.append(divergence * (len(rows) / len(batch)))
                metrics[f"kl/{name}"] = float(divergence.detach())
        return torch.stack(parts).sum(), metrics

    def _divergences(self, items: Sequence[Item]) -> Tensor:
        """Σ KL(π_teacher ‖ π) over the tokens of each item's answer, shape (items,).

        Short and long sequences go through the model apart where that saves more padding than another pass costs.
        """
        lengths = [len(item.chosen) for item in items]
        passes = [self.processes.rows(group, lengths) for group in length_groups(lengths, self._pass_cost)]
        right = self.teachers().say(items, [row for rows, _ in passes for row in rows])
        sums = torch.zeros(len(items), device=next(self.model.parameters()).device)
        for rows, counted in passes:
            logits, _, places = answer_logits(self.model, [items[row].chosen for row in rows], self.pad_id)
            found = token_divergence(torch.cat([right.pop(row) for row in rows]), logits)
            sums = sums.index_add(0, torch.tensor(rows, device=sums.device)[places], found if counted else 0 * found)
        return self.processes.everywhere(sums)

    def _sft(self, batch: Sequence[Item]) -> tuple[Tensor, dict[str, float]]:
        sums, lengths = answer_log_probabilities(
            self.model, [item.chosen for item in batch], self.pad_id, self._pass_cost, self.processes
        )
        per_token = -sums / lengths
        sides = sorted({item.side for item in batch})
        rows = {side: [row for row, item in enumerate(batch) if item.side == side] for side in sides}
        metrics = {f"nll/{side}": float(per_token[rows[side]].mean().detach()) for side in sides}
        return per_token.mean(), metrics

    def shares_prompts(self) -> bool:
        """Whether the prompt of a pair is computed once for both answers: asked for, and the model is able to."""
        if not self.engine.share_prompts:
            return False
        if self._shared is None:
            pairs = [(item.chosen, item.rejected) for item in self.items if item.rejected]
            same = [pair for pair in pairs if pair[0].prompt == pair[1].prompt]
            with self.logits.reading("ones"):
                able = len(same) == len(pairs) > 0 and shares_prompts(self.model, pairs, self.pad_id)
            self._shared = self.processes.agree(able)
        return self._shared

    def _pairs(self, pairs: Sequence[Item]) -> Tensor:
        return both_log_probabilities(
            self.model, pairs, self.pad_id, self._pass_cost, self.processes, self.shares_prompts()
        )

    def _preference(self, batch: Sequence[Item]) -> tuple[Tensor, dict[str, float]]:
        pairs = [item for item in batch if item.rejected]
        table = self._pairs(pairs)
        if self.settings.reference == "random":
            with torch.no_grad(), self.logits.reading("random"):
                fixed = self._pairs(pairs)
        else:
            fixed = self.reference()[[item.index for item in pairs]].to(table.device)
        rewards = self.settings.beta * (table.detach() - fixed)
        if self.settings.loss in AVERAGED:
            lengths = torch.tensor([[len(i.chosen.answer), len(i.rejected.answer)] for i in pairs if i.rejected])
            table, fixed = table / lengths.to(table.device), fixed / lengths.to(table.device)
        losses, _ = preference_loss(
            table[:, 0], table[:, 1], fixed[:, 0], fixed[:, 1], self.settings.beta, self.settings.loss,
            self.settings.label_smoothing,
        )  # fmt: skip
        margins = rewards[:, 0] - rewards[:, 1]  # of whole answers for every loss
        metrics = {
            "rewards/chosen": float(rewards[:, 0].mean()),
            "rewards/rejected": float(rewards[:, 1].mean()),
            "rewards/margins": float(margins.mean()),
            "rewards/accuracies": float((margins > 0).float().mean()),
        }
        loss = losses.mean()
        task = [item for item in batch if not item.rejected]
        if task:
            kept, more = self._sft(task)
            loss = loss + kept * len(task) / len(pairs)
            metrics |= more
        return loss, metrics
