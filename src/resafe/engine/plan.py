"""From a request to a whole plan, from headers alone: every problem is found at once, before a tensor is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from resafe.checkpoints import Checkpoint, RemoteFile, TensorInfo, open_checkpoint, parse_size
from resafe.checkpoints.compare import is_output_layer, vocabulary_note
from resafe.engine.coefficients import Coefficients
from resafe.engine.companion import check_companion, read_through
from resafe.engine.layout import Placed, Unit, lay_out, lay_out_like
from resafe.engine.matching import check_rows, match_vocabularies
from resafe.engine.request import Request
from resafe.engine.sources import SCALE_SUFFIXES, Files, ModelSource, Source, rows_of, source_of
from resafe.engine.vocabulary import ExtendedBase, ExtendedModel, Extension
from resafe.errors import InputError, listed
from resafe.fusion import FUSION, Fusion
from resafe.provenance import digest_value

_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")  # recomputed by every implementation


@dataclass(frozen=True)
class Model:
    """One opened input of the fusion, with its coefficients and the way to its rows."""

    name: str
    checkpoint: Checkpoint
    coefficients: Coefficients
    source: Source


@dataclass(frozen=True)
class Plan:
    """All that will happen.

    Attributes:
        request: What was asked for.
        base: The opened base.
        models: The opened models.
        fusion: The method with its checked settings.
        units: The output files.
        notes: What a user should know: tensors left out, tied heads, … one line each.
        files: Open files.
        extended: The base in the output's vocabulary, where that is not the base's own.
    """

    request: Request
    base: Checkpoint
    models: tuple[Model, ...]
    fusion: Fusion
    units: tuple[Unit, ...]
    notes: tuple[str, ...]
    files: Files
    extended: ExtendedBase | None = None

    @property
    def method(self) -> Any:
        """The registered method."""
        return FUSION.get(self.fusion.name)

    @property
    def needs_base(self) -> bool:
        """Whether the base's rows are read for fused tensors; a mean of whole weights does not need them."""
        return not (self.method.traits["affine"] and all(isinstance(m.source, ModelSource) for m in self.models))

    @property
    def memory(self) -> int:
        """Bytes that buffers may take."""
        return parse_size(self.request.memory, "memory")

    @cached_property
    def device(self) -> torch.device:
        """Where the method computes."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(auto if self.request.device == "auto" else self.request.device)

    @cached_property
    def base_source(self) -> ModelSource | ExtendedBase:
        """The base's rows."""
        return self.extended or ModelSource(self.base, self.files)

    @property
    def remote(self) -> dict[str, Checkpoint]:
        """The inputs that lie in object storage, by name."""
        opened = {"base": self.base, **{model.name: model.checkpoint for model in self.models}}
        return {name: checkpoint for name, checkpoint in opened.items() if checkpoint.remote}

    @property
    def bytes_written(self) -> int:
        """Bytes of all output files."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def passes(self) -> int:
        """How often the inputs are read: once, and once a round of the method's first pass over the model."""
        return 1 + self.fusion.rounds("model")

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs that are read, all passes together."""
        once = copied = 0
        for unit in self.units:
            for tensor in unit.tensors:
                size = self.base.tensors[tensor.name].nbytes
                if not tensor.fused:
                    copied += size
                    continue
                once += size * self.needs_base
                once += sum(m.source.nbytes(tensor.name) for m in self.models if m.source.changes(tensor.name))
        return once * self.passes + copied

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the output's bytes depend on: method, settings, layout, and the state of every input."""
        companion = self.fusion.companion
        beside = {} if companion is None else {"companion": companion.digest}
        if self.extended is not None:
            beside["vocabulary"] = self.extended.extension.digest
        if self.device.type != "cpu":  # a GPU rounds some sums otherwise
            beside["device"] = self.device.type
        return digest_value(
            beside
            | {
                "fusion": [self.fusion.name, self.fusion.resolved(), self.fusion.seed],
                "models": [
                    [m.name, m.checkpoint.kind, asdict(m.coefficients), _state(m.checkpoint)] for m in self.models
                ],
                "base": _state(self.base),
                "units": [hashlib.sha256(unit.header).hexdigest() for unit in self.units],
            }
        )

    def names(self) -> list[str]:
        """Names of the fused tensors, in the order of the output."""
        return [tensor.name for unit in self.units for tensor in unit.tensors if tensor.fused]


def build_plan(request: Request, cache: Path | None = None) -> Plan:
    """Opens all inputs, matches their tensors by name and lays out the output.

    Raises:
        InputError: A checkpoint cannot be opened; or one message with every mismatch: missing, extra and misshapen
            tensors, other vocabularies, wrong settings.
    """
    if not request.models:
        raise InputError("there is no model to fuse", "give at least one under models")
    shard_bytes = None if request.max_shard_size is None else parse_size(request.max_shard_size, "max_shard_size")
    memory = parse_size(request.memory, "memory")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, and this machine has none", "use device: auto or cpu")
    base = open_checkpoint(request.base, allow_pickle=request.allow_pickle, cache=cache)
    if base.kind != "model":
        raise InputError(f"{base.reference}: the base is an adapter", "give the full model, or BASE+ADAPTER as a model")
    names = [model.name or model.reference for model in request.models]
    if len(set(names)) != len(names):
        raise InputError(f"two models have the same name: {', '.join(names)}", "give each a name of its own")
    files, problems, notes = Files(memory // 2), list[str](), list[str]()
    wanted = {name: info for name, info in base.tensors.items() if not _is_scale(name, base)}
    opened = [open_checkpoint(m.reference, allow_pickle=request.allow_pickle, cache=cache) for m in request.models]
    extension: Extension | None = None
    if request.vocabulary == "extend":
        extension, problems, notes = match_vocabularies(base, list(zip(names, opened, strict=True)), wanted)
    else:
        problems, notes = check_rows(base, list(zip(names, opened, strict=True)))
    models = []
    for name, given, checkpoint in zip(names, request.models, opened, strict=True):
        renamed, wrong, remarks = _match(name, checkpoint, base, wanted, extension)
        problems += wrong
        notes += remarks
        coefficients = Coefficients.of(given.weight, list(wanted), f"weight of {name}")
        models.append(Model(name, checkpoint, coefficients, source_of(checkpoint, base, files, renamed)))
    fusion = Fusion(request.method, dict(request.settings), request.seed, tuple(names))
    fusion.resolved()
    problems += FUSION.get(request.method).traits["check"](len(models))
    wanted = wanted if extension is None else extension.reshaped(wanted)
    wrong, remarks = check_companion(fusion, base, list(zip(names, opened, strict=True)), wanted)
    problems += wrong
    notes += remarks
    if problems:
        raise InputError(
            f"the models cannot be fused onto {base.reference}:\n  {listed(problems)}",
            "all models must come from the base, with its architecture and vocabulary" + _remedy(problems, request),
        )
    models = [replace(m, source=read_through(fusion, k, m.source)) for k, m in enumerate(models)]
    extended: ExtendedBase | None = None
    if extension is not None:
        extended = ExtendedBase(ModelSource(base, files), extension, tuple(model.source for model in models))
        models = [replace(m, source=ExtendedModel(m.source, extended, k)) for k, m in enumerate(models)]
    placed = [_placed(info, request, models, fusion, extension) for info in wanted.values()]
    if shard_bytes is not None:
        units = lay_out(placed, shard_bytes)
    else:
        units = lay_out_like(placed, [wanted[tensor.name].file for tensor in placed])
    return Plan(request, base, tuple(models), fusion, tuple(units), tuple(notes), files, extended)


def _remedy(problems: Sequence[str], request: Request) -> str:
    other = any("vocabulary: " in problem for problem in problems) and request.vocabulary == "refuse"
    return "; with vocabulary: extend, tokens that were added are matched by their strings" if other else ""


def _placed(
    info: TensorInfo, request: Request, models: Sequence[Model], fusion: Fusion, extension: Extension | None
) -> Placed:
    fused = info.dtype.is_floating_point and any(model.source.changes(info.name) for model in models)
    if fusion.companion is not None:
        fused = fused and fusion.companion.touches(info.name)
    fused = fused or (extension is not None and info.name in extension.tensors)  # its rows are others than the base's
    dtype = info.dtype
    if request.dtype != "same" and dtype.is_floating_point:
        dtype = getattr(torch, request.dtype)
    elif dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        dtype = torch.bfloat16  # its scales do not fit the fused values, so it is written unpacked
    return Placed(info.name, info.shape, dtype, fused or dtype != info.dtype)


def _is_scale(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor holds the scales of an FP8 one; they are folded into the weight."""
    for suffix in SCALE_SUFFIXES:
        owner = checkpoint.tensors.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if owner is not None and owner.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            return True
    return False


def _match(
    label: str, checkpoint: Checkpoint, base: Checkpoint, wanted: Mapping[str, TensorInfo], extension: Extension | None
) -> tuple[dict[str, str], list[str], list[str]]:
    """Base name → stored name where they differ; what is wrong; what is worth a note."""
    if checkpoint.kind == "adapter":
        return {}, *_match_bases(label, checkpoint.base, base)
    renamed: dict[str, str] = {}
    problems, notes = [], []

    def matched(name: str) -> bool:
        """Whether its rows are matched by token, so that their number may differ."""
        return extension is not None and name in extension.tensors

    for name, info in wanted.items():
        stored = name
        if name not in checkpoint.tensors:
            tied = _tied_to(name, info, checkpoint, matched=matched(name))
            if tied is None:
                problems.append(f"{label}: has no {name}")
                continue
            stored = renamed[name] = tied
            notes.append(f"{label}: {name} is tied to its {tied}; the base stores it, so both are fused")
        other = checkpoint.tensors[stored]
        if other.shape != info.shape and not (matched(name) and other.shape[1:] == info.shape[1:]):
            problems.append(f"{label}: {vocabulary_note(info, other, base, checkpoint)}")
        elif other.dtype.is_floating_point != info.dtype.is_floating_point:
            problems.append(f"{label}: {name} is {_short(other.dtype)}, the base's {_short(info.dtype)}")
    for name in checkpoint.tensors:
        if name in wanted or _is_scale(name, checkpoint):
            continue
        if name.endswith(_BUFFERS):
            notes.append(f"{label}: {name} is left out; it is computed anew when a model is loaded")
        elif base.config.get("tie_word_embeddings") and is_output_layer(name):
            problems.append(f"{label}: stores {name}, which the base ties to its embeddings; untie the base first")
        else:
            problems.append(f"{label}: has {name}, the base does not")
    return renamed, problems, notes


def _match_bases(label: str, own: Checkpoint | None, base: Checkpoint) -> tuple[list[str], list[str]]:
    """Whether an adapter's base is the base: what is wrong, and what is worth a note."""
    if own is None or own.digest == base.digest:
        return [], []
    alike = {n: i.shape for n, i in own.tensors.items()} == {n: i.shape for n, i in base.tensors.items()}
    if alike and (own.remote or base.remote):  # in object storage nothing is hashed, so their bytes are not compared
        return [], [f"{label}: its base {own.reference} is taken for {base.reference}: names and shapes are the same"]
    return [f"{label}: the adapter sits on {own.reference}, not on the base"], []


def _tied_to(name: str, info: TensorInfo, checkpoint: Checkpoint, *, matched: bool = False) -> str | None:
    """The embedding that stands for an output layer which a model with tied weights does not store.

    Its number of rows may differ where they are matched by token.
    """
    if not checkpoint.config.get("tie_word_embeddings") or not is_output_layer(name):
        return None
    from_ = 1 if matched else 0
    same = [
        n
        for n, i in checkpoint.tensors.items()
        if (i.shape[from_:] == info.shape[from_:] and "embed" in n) or n.endswith("wte.weight")
    ]
    return same[0] if len(same) == 1 else None


def _state(checkpoint: Checkpoint) -> list[Any]:
    """What tells a checkpoint from another without reading its tensors: files by path, size, time; headers."""
    files = [file.state if isinstance(file, RemoteFile) else _file_state(file) for file in checkpoint.files]
    tensors = [[i.name, str(i.dtype), list(i.shape), i.offset, i.file.name] for i in checkpoint.tensors.values()]
    return [files, digest_value(tensors), checkpoint.config]


def _file_state(path: Path) -> list[Any]:
    state = path.stat()
    return [str(path), state.st_size, state.st_mtime_ns]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def elements(plan: Plan) -> int:
    """Entries of all fused tensors."""
    return sum(tensor.numel for unit in plan.units for tensor in unit.tensors if tensor.fused)


def largest(plan: Plan) -> Placed:
    """The largest fused tensor, or the largest of all where none is fused."""
    tensors = [tensor for unit in plan.units for tensor in unit.tensors]
    return max([tensor for tensor in tensors if tensor.fused] or tensors, key=lambda tensor: rows_of(tensor.shape))
