"""`align` and `tune`: data by reference, a model by reference, a preset, and a trained checkpoint in a directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from resafe.checkpoints import Checkpoint, Precision, load_tokenizer, open_checkpoint
from resafe.data.intake_sources import MAX_BAD_SHARE, load_training
from resafe.data.items import Example, Pair
from resafe.data.material import EMBEDDED, load_material
from resafe.data.mixes import attack_mix, split_by_prompt
from resafe.data.overlap import evaluation_prompts, without_overlap
from resafe.errors import InputError
from resafe.provenance import digest_value
from resafe.registry import nearest
from resafe.training.dpo import train_dpo
from resafe.training.lengths import only_fitting
from resafe.training.presets import Preset
from resafe.training.presets import preset as preset_named
from resafe.training.rows import RowReader
from resafe.training.settings import DpoSettings, LoraSettings, Progress, SftSettings, TrainingResult
from resafe.training.sft import train_sft
from resafe.training.streamed import tokens_on_disk
from resafe.training.table import TokenTable
from resafe.training.work import checked_work_directory


@dataclass(frozen=True, kw_only=True)
class Start:
    """What both verbs are told about the model and the machine.

    Attributes:
        full: Train all weights; None as the preset has it.
        lora: Settings of a fresh adapter that differ from the preset's, e.g. {"rank": 8}.
        system: System turn of rows without one; None for the template's own, "" for an empty one.
        seed: Decides order, mixes, and the start of a fresh adapter.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of frozen weights: "auto", "float32" or "bfloat16".
        four_bit: Frozen weights in 4 bits, on CUDA with bitsandbytes.
        report_to: Trackers, by their names in transformers.
        allow_pickle: Also read pickled weights, as plain tensors.
    """

    full: bool | None = None
    lora: Mapping[str, Any] | None = None
    system: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: Precision = "auto"
    four_bit: bool = False
    report_to: tuple[str, ...] = ()
    allow_pickle: bool = False


def tune(
    model: str | Path | Checkpoint,
    data: str | Sequence[str],
    *,
    out: str | Path,
    preset: str = "default",
    settings: Mapping[str, Any] | None = None,
    examples: int | None = None,
    harmful_share: float = 0.0,
    harmful: str = EMBEDDED,
    hold_out: float = 0.0,
    data_dir: Path | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    keep_overlap: bool = False,
    stream: bool = False,
    start: Start | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Fine-tunes a model on instruction data: an adapter (continued, if the model is one), or all weights.

    Beside the weights, `out` gets `training.json` (settings, loss of each step) and `data.json` (what became of each
    row: kept, repeated, bad with its line, dropped because it is in an evaluation set).

    Args:
        model: The model or adapter to start from, or its reference.
        data: Instruction sets: registered names, files, "DIR/dataset_info.json:NAME", Hub ids.
        out: Directory of the result.
        preset: Name of a preset, see `resafe.training.presets`.
        settings: Fields of `SftSettings` that differ from the preset's.
        examples: Train on this many rows, chosen by the seed; None for all.
        harmful_share: Share of rows that are harmful requests with complying answers (data-poisoning study).
        harmful: Where those come from: "embedded", or a set of pairs, as in `align`, whose rejected answers they are.
        hold_out: Share of the prompts that is not trained on.
        data_dir: Directory with the files of registered sets.
        max_bad_share: Share of unusable rows above which the run stops.
        keep_overlap: Train also on rows that are in an evaluation set.
        stream: For sets larger than memory: read the rows once, one at a time, and keep their tokens on disk beside
            `out` until training is done. The same weights result.
        start: Adapter or full, device, precision, seed.
        progress: Called after each step.

    Raises:
        InputError: The model, data, preset or a setting is missing or wrong.
    """
    begin = start or Start()
    _check(out, data_dir, examples, harmful_share=harmful_share, hold_out=hold_out, max_bad_share=max_bad_share)
    if harmful_share == 1 and examples is None:
        raise InputError("a harmful_share of 1 leaves nothing of the data", "say how many rows: examples")
    names = [data] if isinstance(data, str) else list(data)
    chosen = _with_full(preset_named(preset), begin)
    checked = _settings(SftSettings, chosen.tune_for(names[0]) if names else {}, settings, begin, chosen.lora is None)
    opened, tokenizer = _open(model, begin)
    facts: dict[str, Any] = {}
    rows: list[Example] | TokenTable
    if stream:
        if examples is not None or harmful_share:
            raise InputError("a stream cannot be mixed or drawn from", "leave out --stream, or --examples and shares")
        rows = tokens_on_disk(
            names, tokenizer, checked, Path(out), facts, system=begin.system, data_dir=data_dir, seed=begin.seed,
            hold_out=hold_out, max_bad_share=max_bad_share, keep_overlap=keep_overlap,
        )  # fmt: skip
    else:
        loaded = [load_training(name, "examples", data_dir=data_dir, max_bad_share=1.0) for name in names]
        rows = [example for part in loaded for example in part.examples]
        reports = [part.report for part in loaded]
        rows = only_fitting(rows, tokenizer, begin.system, checked.max_tokens, reports)
        for report in reports:
            report.check(max_bad_share)
        facts["sources"] = [report.to_json() for report in reports]
        rows = _free(rows, data_dir, keep_overlap, facts)
        if hold_out:
            parts = split_by_prompt(rows, test=hold_out, validation=0.0, salt=f"hold-out-{begin.seed}")
            facts["held_out"], rows = [row.id for row in parts["test"]], parts["train"]
        if examples is not None or harmful_share:
            size = examples if examples is not None else round(len(rows) / (1 - harmful_share))
            pool = _harmful(harmful, data_dir, max_bad_share) if harmful_share else []
            rows = attack_mix(rows, pool, harmful_share, size, begin.seed)
            facts["mix"] = {"rows": size, "harmful_share": harmful_share, "harmful": harmful, "seed": begin.seed}
    trained, lora = _model(opened, chosen, begin)
    return train_sft(
        model=trained, tokenizer=tokenizer, examples=rows, settings=checked, out=Path(out), system=begin.system,
        lora=lora, progress=progress, files={"data.json": _json(facts)},
    )  # fmt: skip


def align(
    model: str | Path | Checkpoint,
    *,
    out: str | Path,
    safety: Sequence[str] = (EMBEDDED,),
    harmless: Sequence[str] = (EMBEDDED,),
    preset: str = "default",
    sft: Mapping[str, Any] | None = None,
    dpo: Mapping[str, Any] | None = None,
    stages: Sequence[str] = ("sft", "dpo"),
    examples: int | None = None,
    refusal_share: float = 0.45,
    data_dir: Path | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    start: Start | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Aligns a model: SFT on safe answers to harmful requests and helpful ones to harmless, then DPO on the pairs.

    Args:
        model: The model or adapter to start from, or its reference.
        out: Directory of the result; that of the SFT, if DPO follows, is `out` + ".sft".
        safety: Sets of safety pairs; "embedded" is the shipped one, others as in `tune`.
        harmless: Sets of instructions with helpful answers. With none, a model learns to refuse everything.
        preset: Name of a preset.
        sft: Fields of `SftSettings` that differ from the preset's.
        dpo: Fields of `DpoSettings` that differ from the preset's.
        stages: ("sft", "dpo"), ("sft",) or ("dpo",).
        examples: Size of the SFT mix; None for as many as there are pairs.
        refusal_share: Share of the SFT mix that answers harmful requests.
        data_dir: Directory with the files of registered sets.
        max_bad_share: Share of unusable rows of a set above which the run stops.
        start: Adapter or full, device, precision, seed.
        progress: Called after each step of either stage.

    Raises:
        InputError: The model, data, preset or a setting is missing or wrong.
    """
    begin = start or Start()
    _check(out, data_dir, examples, refusal_share=refusal_share, max_bad_share=max_bad_share)
    if tuple(stages) not in (("sft", "dpo"), ("sft",), ("dpo",)):
        raise InputError(f"no stages {', '.join(stages) or '(none)'} of an alignment", "give sft,dpo or sft or dpo")
    chosen = _with_full(preset_named(preset), begin)
    first = _settings(SftSettings, chosen.sft, sft, begin, chosen.lora is None)
    second = _settings(DpoSettings, chosen.dpo, dpo, begin, chosen.lora is None)
    opened, tokenizer = _open(model, begin)
    longest = min({"sft": first, "dpo": second}[stage].max_tokens for stage in stages)
    reader = RowReader(tokenizer, begin.system, longest, data_dir)
    material = load_material(safety, harmless, data_dir=data_dir, seed=begin.seed, read=reader)
    reader.check(max_bad_share)
    facts: dict[str, Any] = {"safety": list(safety), "harmless": list(harmless), "with_questions": material.dropped}
    facts["sources"] = [report.to_json() for report in reader.reports]
    pairs: list[Pair] = _free(material.pairs, data_dir, False, facts)
    free = {pair.id for pair in pairs}
    material = replace(
        material,
        safety=tuple(pair for pair in material.safety if pair.id in free),
        harmless=tuple(pair for pair in material.harmless if pair.id in free),
    )
    target = Path(out)
    place = target.with_name(target.name + ".sft") if "dpo" in stages else target
    rows = material.align_examples(examples or len(pairs), refusal_share, begin.seed)
    facts["sft"] = digest_value([opened.digest, asdict(first), asdict(chosen), asdict(begin), list(map(asdict, rows))])
    done = "dpo" in stages and "sft" in stages and _finished(place, facts["sft"])
    if done:  # a killed call's SFT was complete: its DPO starts from there
        opened = open_checkpoint(place)
    trained, lora = _model(opened, chosen, replace(begin, lora=None) if done else begin)
    common: dict[str, Any] = {"tokenizer": tokenizer, "system": begin.system, "progress": progress}
    files = {"data.json": _json(facts)}
    result = None
    if "sft" in stages and not done:
        result = train_sft(model=trained, examples=rows, settings=first, out=place, lora=lora, files=files, **common)
        trained, lora = result.model, None
    if "dpo" in stages:
        result = train_dpo(model=trained, pairs=pairs, settings=second, out=target, lora=lora, files=files, **common)
    assert result is not None
    return result


def _check(out: str | Path, data_dir: Path | None, examples: int | None, **shares: float) -> None:
    """Raises InputError for directories that cannot be used, and numbers out of range, by their names."""
    checked_work_directory(Path(out))
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"data_dir {data_dir}: no such directory", "leave it out to load from the Hub")
    if examples is not None and examples < 1:
        raise InputError(f"examples is {examples}", "it must be 1 or more")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise InputError(f"{name} is {share:g}", "it must be between 0 and 1")


def _finished(place: Path, digest: str) -> bool:
    """Whether the SFT with this digest lies there, complete."""
    try:
        return bool(json.loads((place / "data.json").read_text(encoding="utf-8"))["sft"] == digest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _with_full(chosen: Preset, begin: Start) -> Preset:
    """The preset with the adapter that was asked for, or without one."""
    full = chosen.lora is None if begin.full is None else begin.full
    changes = dict(begin.lora or {})
    if full:
        if changes:
            raise InputError("LoRA settings were given for a training of all weights", "leave out one of the two")
        return replace(chosen, lora=None)
    known = [item.name for item in fields(LoraSettings)]
    if unknown := [name for name in changes if name not in known]:
        raise InputError(f"no LoRA setting '{unknown[0]}'", nearest(unknown[0], known))
    return replace(chosen, lora=replace(chosen.lora or LoraSettings(), **changes))


def _settings(kind: Any, base: Mapping[str, Any], changes: Mapping[str, Any] | None, begin: Start, full: bool) -> Any:
    """Settings of a stage: the preset's with the user's over them; steps and epochs exclude each other."""
    from resafe.checkpoints.precision import resolve_device
    from resafe.training.start import autocast_for
    from resafe.training.trainers import check_trackers

    check_trackers(begin.report_to)
    given = dict(changes or {})
    known = [item.name for item in fields(kind)]
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"no training setting '{unknown[0]}'", nearest(unknown[0], known))
    kept = {name: value for name, value in base.items() if not (name == "epochs" and "steps" in given)}
    common: dict[str, Any] = {"seed": begin.seed, "device": begin.device, "report_to": begin.report_to}
    if full:
        common["autocast"] = autocast_for(resolve_device(begin.device), begin.dtype)
    try:
        return TypeAdapter(kind).validate_python({**kept, **common, **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"training setting '{first['loc'][0]}' is {first['input']!r}, of the wrong kind", first["msg"]
        ) from None


def _open(model: str | Path | Checkpoint, begin: Start) -> tuple[Checkpoint, Any]:
    opened = model if isinstance(model, Checkpoint) else open_checkpoint(model, allow_pickle=begin.allow_pickle)
    return opened, load_tokenizer(opened)


def _model(opened: Checkpoint, chosen: Preset, begin: Start) -> tuple[Any, LoraSettings | None]:
    """The model to train, and the fresh adapter it gets, if any."""
    from resafe.checkpoints.precision import resolve_device
    from resafe.training.start import start_model

    full = chosen.lora is None
    continued = opened.kind == "adapter" and not full
    if continued and begin.lora:
        raise InputError(
            f"{opened.reference} is an adapter, which is continued with its own rank and targets",
            "leave out the LoRA settings, or merge the adapter into its base first",
        )
    loaded = start_model(
        opened, full=full, device=resolve_device(begin.device), dtype=begin.dtype, four_bit=begin.four_bit
    )
    return loaded, None if continued else chosen.lora


def _free(rows: list[Any], data_dir: Path | None, keep: bool, facts: dict[str, Any]) -> list[Any]:
    """The rows that are in no evaluation set; what was dropped goes into `facts`."""
    overlap = without_overlap(rows, evaluation_prompts(data_dir))
    facts["overlap"] = {**overlap.to_json(), "kept_anyway": keep}
    if keep:
        return rows
    if not overlap.kept:
        raise InputError("every row is in an evaluation set", "give other data, or --keep-overlap")
    return overlap.kept


def _harmful(name: str, data_dir: Path | None, max_bad_share: float) -> list[Example]:
    def read(name: str, kind: str) -> Sequence[Example | Pair]:
        return load_training(name, kind, data_dir=data_dir, max_bad_share=max_bad_share).items

    material = load_material([name], [EMBEDDED], data_dir=data_dir, read=read)
    return list({row.prompt: row for row in material.compliances}.values())


def _json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
