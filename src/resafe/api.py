"""The library as a user writes it: open, task vectors, realign, run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from resafe.checkpoints import (
    Checkpoint,
    Precision,
    load_model,
    load_tokenizer,
    open_checkpoint,
    parse_output,
    resolve_dtype,
)
from resafe.checkpoints.staging import check_replaceable, staged
from resafe.data.counted import CountingReader
from resafe.data.intake_sources import MAX_BAD_SHARE
from resafe.data.items import Example
from resafe.data.material import load_material
from resafe.deltas import Space, task_vectors
from resafe.engine import Input, Outcome, Request, build_plan, execute
from resafe.engine.estimate import fit_threads
from resafe.engine.executors import ExecutorName, threads_of
from resafe.engine.lowrank import fuse_adapters
from resafe.engine.request import OutputDtype
from resafe.engine.run import Progress as FuseProgress
from resafe.errors import InputError
from resafe.files import write_whole
from resafe.fusion import Fusion
from resafe.masks.average import average_directories
from resafe.masks.format import load_masks, save_masks
from resafe.masks.processes import launched
from resafe.realign import REALIGN, Problem, write_realigned
from resafe.realign.base import check_strengths
from resafe.realign.recorded import check_order, recorded_fusion

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass
class _Source:
    """A `ModelSource` for an aligned checkpoint: its plain model, without adapters."""

    aligned: Checkpoint
    device: str
    dtype: Precision
    system: str | None

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.aligned)

    def plain(self, device: str | None = None) -> Any:
        base = self.aligned.base if self.aligned.kind == "adapter" else self.aligned
        assert base is not None
        return load_model(base, dtype=resolve_dtype(self.dtype, self.device), device=device or self.device)


def realign(
    aligned: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint | Sequence[str | Path | Checkpoint],
    *,
    out: str | Path,
    method: str = "somf",
    settings: Mapping[str, Any] | None = None,
    strength: float | None = None,
    mask: str | Path | None = None,
    fusion: str | Fusion | None = None,
    fusion_settings: Mapping[str, Any] | None = None,
    pairs: str = "embedded",
    harmless: str = "embedded",
    keep: str | Path | Sequence[str | Path] | None = None,
    keep_limit: int = 256,
    data_dir: Path | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    space: str = "auto",
    system: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: Precision = "auto",
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Realigns tuned models with one method and writes the result.

    Args:
        aligned: The aligned checkpoint or its reference.
        tuned: A tuned checkpoint or its reference; several are fused.
        out: Directory to write.
        method: A registered realign method.
        settings: Its settings; the rest are its defaults.
        strength: A strength of the method; None takes 1 where the grid has it, else the middle of the grid. To have
            it chosen on validation questions, run a recipe.
        mask: A mask directory to apply, in place of training one (method "somf").
        fusion: A registered fusion method, or one with its settings and seed; None is the one that a given mask was
            learnt with, else task arithmetic.
        fusion_settings: Its settings.
        pairs: Safety pairs for methods that learn.
        harmless: Harmless examples for methods that learn.
        keep: Task examples whose behaviour they are to keep: a set or a file, or one for each tuned checkpoint.
        keep_limit: The first so many of each are taken.
        data_dir: Directory with the files of public sets.
        max_bad_share: Share of unusable rows of a set above which it is refused.
        space: "auto", "factors" or "weights", for adapters.
        system: System turn of the prompts that methods learn from.
        seed: Seed.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of the frozen weights that methods learn with: "auto", "float32" or "bfloat16".
        allow_pickle: Also read pickled weights (`*.bin`), as plain tensors only.
        progress: Called with (step, steps, metrics).

    Returns:
        The directory that was written.

    Raises:
        InputError: A checkpoint, method, setting or data set is wrong or missing.
    """
    chosen = REALIGN.get(method)
    given = dict(settings or {}) | ({} if mask is None else {"mask": Path(mask)})
    checked = chosen.check(given)
    if strength is not None:
        check_strengths([strength])
    check_replaceable(Path(out))  # now, and not when training is done
    tuned = _several(tuned)
    reader = CountingReader(data_dir, max_bad_share)
    trains = bool(chosen.traits.get("trains")) and checked.get("mask") is None
    if keep and not trains:
        raise InputError("keep is for what learns, and nothing does here", "leave it out")
    examples, owners = _examples(keep, len(tuned), keep_limit, reader)
    masks = load_masks(Path(checked["mask"])) if checked.get("mask") is not None and fusion is None else ()
    if fusion is None:
        known = masks[0].provenance if masks else {}
        fusion = recorded_fusion(known, len(tuned), None, fusion_settings, seed or None)
    problem, opened = _problem(
        aligned, tuned, Path(out), trains=trains, keep=examples, keep_of=owners, fusion=fusion,
        fusion_settings=fusion_settings, pairs=pairs, harmless=harmless, data_dir=data_dir, space=space, system=system,
        seed=seed, device=device, dtype=dtype, allow_pickle=allow_pickle, progress=progress, reader=reader,
    )  # fmt: skip
    if masks:
        check_order(masks, [item.digest for item in opened], [item.reference for item in opened])
    family = chosen.function(problem, **checked)
    grid = family.strengths
    at = strength if strength is not None else (1.0 if 1.0 in grid else grid[len(grid) // 2])
    card = f"# Realigned with resafe\n\nMethod: {chosen.title} ({chosen.source}), {family.strength} {at:g}.\n"
    processes = launched()
    if processes.main:
        write_realigned(Path(out), problem.vectors, family.at(at), opened[0], card)
        _write_account(Path(out), reader)
        if problem.work is not None:  # what a killed call would have gone on from
            shutil.rmtree(problem.work, ignore_errors=True)
    processes.wait()
    return Path(out)


def _problem(
    aligned: str | Path | Checkpoint, tuned: Sequence[str | Path | Checkpoint], out: Path, *, trains: bool,
    fusion: str | Fusion, fusion_settings: Mapping[str, Any] | None, pairs: str, harmless: str, data_dir: Path | None,
    space: str, system: str | None, seed: int, device: str, dtype: Precision, allow_pickle: bool,
    progress: Progress | None, reader: CountingReader, keep: Sequence[Example] = (), keep_of: Sequence[int] = (),
) -> tuple[Problem, list[Checkpoint]]:  # fmt: skip
    """The realignment of a call, and the tuned checkpoints; data and a model only where something learns."""
    if not tuned:
        raise InputError("no tuned checkpoint was given", "give at least one")
    combined = fusion if isinstance(fusion, Fusion) else Fusion(fusion, dict(fusion_settings or {}), seed)
    combined.resolved()  # refuses unknown names and settings before anything is loaded
    safe = _opened(aligned, allow_pickle)
    opened = [_opened(item, allow_pickle) for item in tuned]
    source, material = None, None
    if trains:
        from resafe.checkpoints.precision import resolve_device

        launched()  # of several processes each takes its own GPU
        source = _Source(safe, str(resolve_device(device)), dtype, system)
        material = load_material([pairs], [harmless], data_dir=data_dir, seed=seed, read=reader)
    problem = Problem(
        vectors=task_vectors(opened, safe, cast(Space, space)),
        fusion=combined,
        pairs=material.pairs if material else (),
        keep=keep,
        keep_of=keep_of,
        source=source,
        seed=seed,
        work=out.with_name(out.name + ".work"),
        progress=progress,
    )
    return problem, opened


def train_mask(
    aligned: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint | Sequence[str | Path | Checkpoint],
    *,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    fusion: str = "task_arithmetic",
    fusion_settings: Mapping[str, Any] | None = None,
    pairs: str = "embedded",
    harmless: str = "embedded",
    keep: str | Path | Sequence[str | Path] | None = None,
    keep_limit: int = 256,
    data_dir: Path | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    space: str = "auto",
    system: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: Precision = "auto",
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Learns one safety mask over the task vectors of tuned models (SOMF) and writes it; a killed call goes on.

    Under `torchrun` the processes share the model and the work.

    Args:
        aligned: The aligned checkpoint or its reference.
        tuned: Tuned checkpoints or references, which share the mask.
        out: Directory of the mask.
        settings: Settings of the method `somf`; the rest are its preset's.
        fusion: The fusion method inside the loop.
        fusion_settings: Its settings.
        pairs: Safety pairs.
        harmless: Harmless examples.
        keep: Task examples whose behaviour the mask is to keep: a set or a file, or one for each tuned checkpoint.
        keep_limit: The first so many of each are taken.
        data_dir: Directory with the files of public sets.
        max_bad_share: Share of unusable rows of a set above which it is refused; which rows are is in `data.json`.
        space: "auto", "factors" or "weights", for adapters.
        system: System turn of the prompts.
        seed: Seed.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of the frozen weights: "auto", "float32" or "bfloat16".
        allow_pickle: Also read pickled weights (`*.bin`), as plain tensors only.
        progress: Called with (step, steps, metrics).

    Returns:
        `out`, for `apply_mask` or the fusion method `mask`.

    Raises:
        InputError: A checkpoint, setting or data set is wrong or missing.
    """
    somf = REALIGN.get("somf")
    checked = somf.check(dict(settings or {}))
    if "mask" in checked and checked["mask"] is not None:
        raise InputError("settings name a mask, and one is to be trained", "leave it out, or apply it")
    target = Path(out)
    check_replaceable(target)
    tuned = _several(tuned)
    reader = CountingReader(data_dir, max_bad_share)
    examples, owners = _examples(keep, len(tuned), keep_limit, reader)
    problem, _ = _problem(
        aligned, tuned, target, trains=True, fusion=fusion, fusion_settings=fusion_settings, pairs=pairs,
        harmless=harmless, data_dir=data_dir, space=space, system=system, seed=seed, device=device, dtype=dtype,
        allow_pickle=allow_pickle, progress=progress, reader=reader,
        keep=examples, keep_of=owners,
    )  # fmt: skip
    masks = somf.function(problem, **checked).masks
    processes = launched()
    if processes.main:
        with staged(target) as stage:
            save_masks(masks, stage)
            _write_account(stage, reader)
        if problem.work is not None:
            shutil.rmtree(problem.work, ignore_errors=True)
    processes.wait()
    return target


def apply_mask(
    mask: str | Path,
    aligned: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint | Sequence[str | Path | Checkpoint],
    *,
    out: str | Path,
    strength: float | None = None,
    transfer: bool = False,
    fusion: str | None = None,
    fusion_settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    **others: Any,
) -> Path:
    """Applies a mask to the models it was learnt on, or to others tuned from the same aligned model (transfer).

    Args:
        mask: Directory of the mask.
        aligned: The aligned checkpoint or its reference.
        tuned: Tuned checkpoints or references, in the order in which the mask was learnt on them.
        out: Directory to write.
        strength: How much of what the mask removes is removed; 1 is the mask, None too.
        transfer: The tuned models may be others than those that the mask was learnt on.
        fusion: Another fusion method than the mask was learnt with, which is warned of; None takes that one, or task
            arithmetic where the mask does not say.
        fusion_settings: Settings that replace single ones of the mask's fusion.
        seed: Seed of its draws; None takes the mask's.
        others: As for `realign`: space, allow_pickle.

    Returns:
        The directory that was written.

    Raises:
        InputError: The mask belongs to other models or to these in another order, or does not fit their tensors.
    """
    allow_pickle = bool(others.get("allow_pickle", False))
    safe = _opened(aligned, allow_pickle)
    opened = [_opened(item, allow_pickle) for item in _several(tuned)]
    masks = load_masks(Path(mask))
    known = masks[0].provenance
    if known.get("aligned") not in (None, safe.digest):
        raise InputError(
            f"{mask}: was learnt on another aligned model than {safe.reference}", "give the one it was learnt on"
        )
    strange = [item.reference for item in opened if known.get("tuned") and item.digest not in known["tuned"]]
    if strange and not transfer:
        raise InputError(
            f"{mask}: was not learnt on {', '.join(strange)}",
            "to use it on another task all the same: resafe mask transfer (transfer=True)",
        )
    if not transfer:
        check_order(masks, [item.digest for item in opened], [item.reference for item in opened])
    chosen = recorded_fusion(known, len(opened), fusion, fusion_settings, seed, warn=not transfer)
    return realign(safe, opened, out=out, mask=mask, strength=strength, fusion=chosen, seed=chosen.seed, **others)


def average_masks(masks: Sequence[str | Path], *, out: str | Path, weights: Sequence[float] | None = None) -> Path:
    """Writes the mean of masks over the same task vectors.

    Args:
        masks: Directories of masks.
        out: Directory to write.
        weights: One a mask; None weighs all alike.

    Returns:
        `out`.

    Raises:
        InputError: A mask is missing or damaged, or they do not fit together.
    """
    target = Path(out)
    check_replaceable(target)
    mean = average_directories([Path(mask) for mask in masks], weights)
    with staged(target) as stage:
        save_masks(mean, stage)
    return target


def _examples(
    keep: str | Path | Sequence[str | Path] | None, models: int, limit: int, reader: CountingReader
) -> tuple[list[Example], list[int]]:
    """Task examples, and the tuned model that each belongs to; empty if one set stands for several models."""
    names = [str(name) for name in ([keep] if isinstance(keep, str | Path) else keep or ())]
    if len(names) not in (0, 1, models):
        raise InputError(
            f"keep names {len(names)} sets for {models} tuned models",
            "give one for each, in their order, or one for all",
        )
    found = [[item for item in reader(name, "examples") if isinstance(item, Example)][:limit] for name in names]
    owners = [place for place, few in enumerate(found) for _ in few] if len(names) == models else []
    return [item for few in found for item in few], owners


def _write_account(directory: Path, reader: CountingReader) -> None:
    """What became of the rows of the sets that were read, if any were."""
    if reader.reports:
        text = json.dumps({"sources": reader.to_json()}, indent=1, ensure_ascii=False)
        write_whole(directory / "data.json", f"{text}\n")


def _several(tuned: str | Path | Checkpoint | Sequence[str | Path | Checkpoint]) -> Sequence[str | Path | Checkpoint]:
    return [tuned] if isinstance(tuned, str | Path | Checkpoint) else tuned


def _opened(item: str | Path | Checkpoint, allow_pickle: bool) -> Checkpoint:
    return item if isinstance(item, Checkpoint) else open_checkpoint(item, allow_pickle=allow_pickle)


def fuse(
    base: str | Path,
    models: Sequence[str | Path | Input],
    *,
    out: str | Path,
    method: str = "task_arithmetic",
    settings: Mapping[str, Any] | None = None,
    weights: Sequence[Any] | None = None,
    dtype: OutputDtype = "same",
    max_shard_size: int | str | None = None,
    seed: int = 0,
    memory: int | str = "2GB",
    device: Literal["cpu", "cuda", "auto"] = "cpu",
    threads: int | None = None,
    rank: int = 0,
    world: int = 1,
    output: Literal["model", "adapter"] = "model",
    adapter_rank: int | None = None,
    vocabulary: Literal["refuse", "extend"] = "refuse",
    allow_pickle: bool = False,
    progress: FuseProgress | None = None,
    executor: ExecutorName = "threads",
    ray_address: str | None = None,
) -> Outcome:
    """Fuses tuned models onto their base and writes the result; an interrupted call goes on when it is repeated.

    Args:
        base: The aligned model (or the base) that task vectors are taken from.
        models: Tuned models or adapters: references, or `resafe.engine.Input`s with names and coefficients.
        out: Directory to write, or an address in object storage (`s3://bucket/prefix`).
        method: A registered fusion method.
        settings: Its settings; the rest are its defaults.
        weights: One coefficient a model: a number, a gradient over the layers, or a mapping of name patterns.
        dtype: "same" keeps every tensor's dtype in the base.
        max_shard_size: Bytes of an output file at most, or e.g. "5GB"; None makes files as the base has them.
        seed: Seed of random methods.
        memory: Most that buffers may take; under Ray, those of a task.
        device: Where methods compute; a GPU pays for those that compute much, such as TIES or singular vectors.
        threads: Worker threads; None is one a core. Under Ray, threads and cores of a task; None is 1.
        rank: This process's share of the files, 0 to world − 1.
        world: Processes that share the work and the output directory.
        output: "model", or "adapter" where all models are adapters and the method is a weighted sum of them.
        adapter_rank: Rank of a written adapter at most; None keeps the exact sum.
        vocabulary: "refuse" models with another vocabulary, or "extend" the base's by the tokens that they added.
        allow_pickle: Also read pickled weights, as plain tensors only.
        progress: Called with (what, bytes done, bytes in all).
        executor: "serial", "threads", or "ray" for one Ray task an output file; the result is the same.
        ray_address: Of a Ray cluster; None takes the one that runs here, or starts one.

    Returns:
        What was done; `committed` is False where other ranks are still at work.

    Raises:
        InputError: Inputs do not fit together, or a setting is wrong; all problems are in one message.
        ResafeError: The disk or object storage failed; what is finished stays.
    """
    given = [item if isinstance(item, Input) else Input(str(item)) for item in models]
    if weights is not None:
        if len(weights) != len(given):
            raise InputError(f"{len(weights)} weights for {len(given)} models", "give one a model")
        given = [replace(item, weight=weight) for item, weight in zip(given, weights, strict=True)]
    request = Request(
        base=str(base), models=tuple(given), out=parse_output(out), method=method, settings=dict(settings or {}),
        dtype=dtype, max_shard_size=max_shard_size, seed=seed, memory=memory, device=device, output=output,
        rank=adapter_rank, vocabulary=vocabulary, allow_pickle=allow_pickle,
    )  # fmt: skip
    return run_fusion(
        request, threads=threads, rank=rank, world=world, progress=progress, executor=executor, ray_address=ray_address
    )


def run_fusion(
    request: Request,
    *,
    threads: int | None = None,
    rank: int = 0,
    world: int = 1,
    progress: FuseProgress | None = None,
    note: Callable[[str], None] | None = None,
    executor: ExecutorName = "threads",
    ray_address: str | None = None,
) -> Outcome:
    """Plans and carries out a fusion; `note` is told what the plan remarks. Otherwise as `fuse`."""
    plan = build_plan(request)
    for remark in plan.notes:
        if note:
            note(remark)
    if request.output == "adapter":
        start = time.monotonic()
        written = fuse_adapters(plan, request.rank)
        if note:
            note(f"rank {written.rank}, relative error {written.error:.3g}")
        return Outcome(written.out, True, (), 1, time.monotonic() - start)
    workers = fit_threads(plan, threads_of(executor, threads))
    return execute(
        plan, threads=workers, rank=rank, world=world, progress=progress, executor=executor, ray_address=ray_address
    )
