"""Writes adapters and models as directories that transformers and PEFT open. Knows nothing of how they came to be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from resafe.checkpoints.adapter import adapter_modules, check_shapes_fit, over_experts
from resafe.checkpoints.loading import quiet, tokenizer_directory
from resafe.checkpoints.reader import Checkpoint
from resafe.checkpoints.sizes import parse_size
from resafe.checkpoints.staging import ensure_space, staged
from resafe.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_MODEL_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


def save_adapter(
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    like: Checkpoint,
    card: str,
    *,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a PEFT adapter directory: weights, configuration, card, and the tokenizer if `like` has its own.

    Args:
        out: The directory to write; replaced if resafe wrote it.
        tensors: The adapter's tensors by the names PEFT saves.
        like: The adapter whose configuration is taken over.
        card: The text of README.md.
        config: Fields of the configuration to set (`r`, `lora_alpha`, …), for example after a change of rank.

    Returns:
        `out`.

    Raises:
        InputError: `like` is no adapter, the tensors do not fit its base or the configured rank, there is no room, or
            `out` is not ours.
    """
    if like.kind != "adapter":
        raise InputError(
            f"{like.reference}: is not an adapter, so an adapter cannot be written like it", "use save_model"
        )
    settings = {
        **like.config,
        **(config or {}),
        "base_model_name_or_path": _base_for(out, like),
        "inference_mode": True,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_rank(shapes, settings, out)
    if like.base is not None:
        check_shapes_fit(shapes, settings, like.base, str(out))
    stored = _storable(tensors, set(tensors))
    ensure_space(out, _nbytes(stored))
    with staged(out) as stage:
        save_file(stored, stage / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(stage / "adapter_config.json", settings)
        if tokenizer_directory(like) == like.path:
            _copy(like.path, stage, _TOKENIZER_FILES)
        (stage / "README.md").write_text(card, encoding="utf-8")
    return out


def save_model(
    out: Path,
    model: PreTrainedModel | Mapping[str, torch.Tensor],
    like: Checkpoint,
    card: str,
    max_shard_size: int | str = "5GB",
    *,
    keep_existing: bool = False,
) -> Path:
    """Writes a full model: weights (sharded beyond `max_shard_size`), configuration, tokenizer, chat template, card.

    Args:
        out: The directory to write; replaced if resafe wrote it.
        model: A model with adapters merged, or all its tensors by the checkpoint's names. Tied ones are stored once.
        like: The checkpoint whose tokenizer, chat template and generation settings are copied, and, for tensors, whose
            configuration is; an adapter stands for its base where it has no file of its own.
        card: The text of README.md.
        max_shard_size: Bytes of a shard at most, or a text such as "5GB"; a larger tensor gets a shard of its own.
        keep_existing: Where another process has written `out` meanwhile, keep that (see `staged`).

    Returns:
        `out`.

    Raises:
        InputError: An unmerged PEFT model, no room on the disk, or `out` is not ours.
    """
    shard_bytes = parse_size(max_shard_size, "max_shard_size")
    source = like if like.kind == "model" else like.base
    if source is None:
        raise InputError(
            f"{like.reference}: names no base, so its configuration is not known", "open it as BASE+ADAPTER"
        )
    if isinstance(model, Mapping):
        stored = _storable(model, set(source.tensors))
        ensure_space(out, _nbytes(stored))
        with staged(out, keep_existing=keep_existing) as stage:
            _write_shards(stage, stored, shard_bytes)
            write_json(stage / "config.json", _with_dtype(source.config, stored))
            _finish(stage, like, source, card)
        return out
    if getattr(model, "peft_config", None):
        raise InputError(
            "the model still carries an adapter", "load it with merge=True, or write the adapter by save_adapter"
        )
    ensure_space(out, _nbytes(model.state_dict()))
    with staged(out, keep_existing=keep_existing) as stage:
        with quiet():
            model.save_pretrained(stage, max_shard_size=shard_bytes)
        _finish(stage, like, source, card)
    return out


def _finish(stage: Path, like: Checkpoint, source: Checkpoint, card: str) -> None:
    """What is copied rather than computed."""
    _copy(source.path, stage, _MODEL_FILES)
    _copy(tokenizer_directory(like), stage, _TOKENIZER_FILES)
    (stage / "README.md").write_text(card, encoding="utf-8")


def _copy(source: Path, stage: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, stage / name)


def _write_shards(stage: Path, tensors: dict[str, torch.Tensor], shard_bytes: int) -> None:
    """One file, or numbered shards and the index that names them; tensors in the order given."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, stage / file, metadata={"format": "pt"})
    if split.is_sharded:
        total = {"total_size": _nbytes(tensors)}
        write_json(stage / "model.safetensors.index.json", {"metadata": total, "weight_map": split.tensor_to_filename})


def _storable(tensors: Mapping[str, torch.Tensor], preferred: set[str]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU, each with memory of its own; of several names for the same memory, one is kept.

    The name kept is one in `preferred` (the names the original checkpoint stores), else the first.
    """
    if not tensors:
        raise InputError("there are no tensors to write", "check what was passed")
    views: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        view = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        key: tuple[Any, ...] = view if tensor.numel() else (name,)
        if key not in views or (name in preferred and views[key] not in preferred):
            views[key] = name
    kept = set(views.values())
    owners: dict[int, int] = {}
    for name in kept:
        pointer = tensors[name].untyped_storage().data_ptr()
        owners[pointer] = owners.get(pointer, 0) + 1
    stored = {}
    for name, tensor in tensors.items():
        if name in kept:
            plain = tensor.detach().cpu().contiguous()
            stored[name] = plain.clone() if owners[tensor.untyped_storage().data_ptr()] > 1 else plain
    return stored


def _nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of all tensors, shared memory counted once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors.values()}.values())


def _with_dtype(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The configuration with the dtype that most of the stored values have; a stale one would make loaders round."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[str(tensor.dtype)] = counts.get(str(tensor.dtype), 0) + tensor.numel()
    settings = {name: value for name, value in config.items() if name != "torch_dtype"}
    return (
        {**settings, "dtype": max(counts, key=lambda name: counts[name]).removeprefix("torch.")} if counts else settings
    )


def _base_for(out: Path, like: Checkpoint) -> Any:
    """The base's reference, valid from the new place."""
    named = like.config.get("base_model_name_or_path")
    if like.base is None:
        return named
    if isinstance(named, str) and named and not Path(named).is_absolute() and _same(like.path / named, like.base.path):
        return os.path.relpath(like.base.path, Path(os.path.realpath(out)))
    written = Path(like.base.reference).expanduser()
    return str(written.resolve()) if written.exists() else like.base.reference


def _same(first: Path, second: Path) -> bool:
    return first.exists() and first.resolve() == second.resolve()


def _check_rank(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], out: Path) -> None:
    """Without patterns, every A must have the configured rank: another would be scaled wrongly, or not load at all."""
    if settings.get("rank_pattern") or str(settings.get("peft_type", "LORA")).upper() != "LORA":
        return
    for module in adapter_modules(list(shapes)).values():
        name = module.parts.get("lora_A") or module.parts.get("lora_embedding_A")
        if over_experts(module.module) or settings.get("target_parameters"):
            continue  # of a rank an expert
        if name and shapes[name][0] != settings.get("r"):
            raise InputError(
                f"{out}: tensor {name!r} has rank {shapes[name][0]}, the configuration has r = {settings.get('r')}",
                "pass config={'r': …, 'lora_alpha': …} so that lora_alpha / r keeps its value",
            )


def write_companions(stage: Path, like: Checkpoint, dtype: torch.dtype, card: str) -> None:
    """Everything of a model directory but its weights: configuration, tokenizer, chat template, generation, card.

    Args:
        stage: The directory.
        like: The model whose files are taken over.
        dtype: The dtype that its configuration is to name.
        card: The text of README.md.
    """
    settings = {
        name: value for name, value in like.config.items() if name not in ("torch_dtype", "quantization_config")
    }
    write_json(stage / "config.json", {**settings, "dtype": str(dtype).removeprefix("torch.")})
    _finish(stage, like, like, card)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file of a model directory, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
