"""Supervised fine-tuning through TRL: examples in, an adapter or a model out. Knows no data sets and no recipes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resafe.data.chat import before_prompt, encode_answer, encode_dialogue
from resafe.data.items import Example, Reply, Turn
from resafe.errors import InputError
from resafe.training.settings import LoraSettings, Progress, SftSettings, TrainingResult
from resafe.training.table import TokenRow, TokenTable, rows_digest

IGNORED = -100
"""The label of a token that is not learnt."""


def encode_examples(
    tokenizer: Any,
    examples: Sequence[Example],
    system: str | None,
    max_tokens: int,
    max_answer_tokens: int | None = None,
    whole_share: float = 0.0,
) -> tuple[list[TokenRow], int]:
    """Tokens and labels of examples; labels are `IGNORED` on the prompt.

    Args:
        tokenizer: Tokenizer with a chat template.
        examples: What is to be learnt.
        system: System turn; None for the template's default, "" for an empty one.
        max_tokens: Where sequences are cut.
        max_answer_tokens: Where answers are cut; None for nowhere but at `max_tokens`.
        whole_share: Share of the examples, evenly spread, whose answers are not cut.

    Returns:
        Rows with `input_ids` and `labels` of equal length, and the number of examples dropped because nothing of
        their answer was left.

    Raises:
        InputError: Nothing is left to train on.
    """
    found = list(encoded_rows(tokenizer, examples, system, max_tokens, max_answer_tokens, whole_share))
    rows = [row for row in found if row is not None]
    if not rows:
        raise nothing_left(len(examples))
    return rows, len(examples) - len(rows)


def nothing_left(examples: int) -> InputError:
    """The error of a run whose examples are all dropped."""
    return InputError(
        f"no example of {examples} is left to train on",
        "give examples, or raise max_tokens: their prompts alone are longer" if examples else "give examples",
    )


def encoded_rows(
    tokenizer: Any,
    examples: Iterable[Example],
    system: str | None,
    max_tokens: int,
    max_answer_tokens: int | None = None,
    whole_share: float = 0.0,
) -> Iterator[TokenRow | None]:
    """As `encode_examples`, one at a time; None for an example of which no answer is left."""
    for place, example in enumerate(examples):
        own, before = before_prompt(example, system)
        if before and not isinstance(example, Reply):
            yield _dialogue(tokenizer, example, own, before, max_tokens)
            continue
        prompt, answer = encode_answer(tokenizer, example.prompt, example.response, own, before)
        if len(prompt) >= max_tokens or not answer:
            yield None
            continue
        whole = int((place + 1) * whole_share) > int(place * whole_share)
        ids = (prompt + (answer if whole else answer[:max_answer_tokens]))[:max_tokens]
        yield {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}


def _dialogue(
    tokenizer: Any, example: Example, system: str | None, history: Sequence[Turn], max_tokens: int
) -> TokenRow | None:
    """The row of a dialogue, in which all answers are learnt; none if `max_tokens` leaves no answer."""
    ids: list[int] = []
    labels: list[int] = []
    for head, tail in encode_dialogue(tokenizer, example.prompt, example.response, system, history):
        ids += head + tail
        labels += [IGNORED] * len(head) + tail
    ids, labels = ids[:max_tokens], labels[:max_tokens]
    return {"input_ids": ids, "labels": labels} if any(label != IGNORED for label in labels) else None


def train_sft(
    *,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example] | TokenTable,
    settings: SftSettings,
    out: Path,
    system: str | None = None,
    lora: LoraSettings | None = None,
    progress: Progress | None = None,
    files: Mapping[str, str] | None = None,
) -> TrainingResult:
    """Fine-tunes a model on answers (the loss is on answer tokens only) and writes it to `out`.

    A killed run goes on from its last checkpoint (in `out` + ".work") when called again with the same model,
    examples and settings, and ends with the same weights. `out` appears when training is done.

    Args:
        model: A causal language model, or a PeftModel whose adapter is continued. Changed in place.
        tokenizer: Its tokenizer, with a chat template.
        examples: What is to be learnt, or a table of its tokens on disk, encoded with these settings.
        settings: Steps, learning rate, batch, seed, device, …
        out: Directory of the adapter (or of the model, if all weights are trained).
        system: System turn of every example; None for the template's default, "" for an empty one.
        lora: A fresh adapter; None continues the model's own, or trains all weights if it has none.
        progress: Called after each step with `loss`, `learning_rate`, `grad_norm`, `tokens_per_second`, ….
        files: More text files for `out`, by name.

    Returns:
        The trained model, where it was written, and the losses.

    Raises:
        InputError: No examples, no chat template, an unusable device, or an adapter that does not fit the model.
    """
    from resafe.checkpoints.precision import resolve_device
    from resafe.training.adapters import with_trainable
    from resafe.training.order import length_grouped_order
    from resafe.training.packing import check_packing, packed_lengths
    from resafe.training.trainers import sft_trainer

    resolve_device(settings.device)
    dataset, lengths, content, dropped = _rows(tokenizer, examples, settings, system)
    steps = settings.total_steps(len(lengths))
    order = length_grouped_order(lengths, settings.batch_size, steps, settings.seed)
    longest = max(lengths)
    if settings.packing:
        longest = max(packed_lengths(order, lengths, settings.micro_batch_size or settings.batch_size))
        ranked = sorted(range(len(lengths)), key=lambda index: lengths[index])
        check_packing(model, *(dataset[index]["input_ids"] for index in (ranked[-1], ranked[0])))
    trained = with_trainable(model, lora, settings.seed)
    return run_training(
        kind="sft",
        build=lambda work, callback: sft_trainer(trained, tokenizer, dataset, settings, work, order, callback),
        model=trained,
        tokenizer=tokenizer,
        settings=settings,
        out=out,
        content=content,
        rows=len(lengths),
        tokens=_tokens_of_steps(order, lengths, settings.batch_size),
        longest=longest,
        dropped=dropped,
        progress=progress,
        files=files,
    )


def _rows(
    tokenizer: Any, examples: Sequence[Example] | TokenTable, settings: SftSettings, system: str | None
) -> tuple[Any, list[int], str, int]:
    """The rows as a `datasets.Dataset`, their lengths and digest, and the number of examples dropped."""
    from datasets import Dataset

    if isinstance(examples, TokenTable):
        if not examples.count:
            raise nothing_left(examples.dropped)
        return examples.dataset(), examples.lengths(), examples.digest, examples.dropped
    rows, dropped = encode_examples(
        tokenizer, examples, system, settings.max_tokens, settings.max_answer_tokens, settings.whole_share
    )
    return Dataset.from_list(rows), [len(row["input_ids"]) for row in rows], rows_digest(rows), dropped


def _tokens_of_steps(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    return [
        sum(lengths[index] for index in order[start : start + batch_size]) for start in range(0, len(order), batch_size)
    ]


def run_training(
    *,
    kind: str,
    build: Any,
    model: Any,
    tokenizer: Any,
    settings: Any,
    out: Path,
    content: str,
    rows: int,
    tokens: list[int],
    longest: int,
    dropped: int,
    progress: Progress | None,
    files: Mapping[str, str] | None = None,
) -> TrainingResult:
    """The part that SFT and DPO share: resume, train, write.

    Args:
        kind: "sft" or "dpo".
        build: Called with the working directory and a callback, gives the trainer.
        model: The model with its trainable weights chosen.
        tokenizer: Its tokenizer.
        settings: `SftSettings` or `DpoSettings`.
        out: Where the result goes.
        content: Digest of the tokens that are trained on; part of the run's identity.
        rows: How many rows they are.
        tokens: Tokens of each optimizer step.
        longest: Tokens of the longest sequence.
        dropped: Examples left out.
        progress: Called after each step.
        files: More text files for `out`, by name.

    Returns:
        The result.
    """
    from resafe.checkpoints.attention import short_attention
    from resafe.training.adapters import is_adapter, tied_names, write_result
    from resafe.training.head import forward_restored
    from resafe.training.progress import ProgressCallback
    from resafe.training.work import checked_work_directory, last_checkpoint, processes, remove_work, run_identity

    work = checked_work_directory(out)
    state = processes()
    identity = run_identity(kind, model, settings, content)
    with state.main_process_first():  # the first clears what another run left, the others find it clear
        checkpoint = last_checkpoint(work, identity)
    callback = ProgressCallback(progress, tokens)
    tied = tied_names(model)
    base = model.get_base_model() if is_adapter(model) else model
    with forward_restored(base), short_attention(model, longest), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between the libraries; nothing a user can act on
        trainer = build(work, callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    weights = None
    if trainer.is_fsdp_enabled:  # from all shards, where tied weights are no longer known to be one
        gathered = trainer.accelerator.get_state_dict(trainer.model)
        weights = {name: weight for name, weight in gathered.items() if name not in tied}
    trained.eval()
    if state.is_main_process:
        record = {"kind": kind, "steps": len(tokens), "rows": rows, "dropped": dropped, "losses": losses}
        curve = json.dumps({**record, "settings": vars(settings)}, indent=1, default=str) + "\n"
        card = _card(kind, settings, len(tokens), rows)
        write_result(trained, tokenizer, out, card, {"training.json": curve, **(files or {})}, weights)
        remove_work(work)
    state.wait_for_everyone()
    return TrainingResult(
        path=out,
        model=trained,
        steps=len(tokens),
        losses=losses,
        tokens=callback.tokens_seen,
        seconds=callback.seconds,
        resumed_from=callback.first_step,
        dropped=dropped,
    )


def _card(kind: str, settings: Any, steps: int, examples: int) -> str:
    names = {"sft": "supervised fine-tuning", "dpo": "direct preference optimisation"}
    shown = "\n".join(
        f"| {key} | {value} |"
        for key, value in vars(settings).items()
        if key not in ("device", "save_every", "report_to")
    )
    return (
        f"# Trained with resafe\n\nBy {names[kind]} on {examples} rows for {steps} steps.\n\n"
        f"| setting | value |\n| --- | --- |\n{shown}\n"
    )
