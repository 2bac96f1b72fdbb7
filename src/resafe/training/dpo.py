"""Direct preference optimisation through TRL: pairs in, an adapter out. Knows no data sets and no recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resafe.data.chat import before_prompt, encode_answer
from resafe.data.items import Pair
from resafe.errors import InputError
from resafe.training.settings import DpoSettings, LoraSettings, Progress, TrainingResult
from resafe.training.table import rows_digest


def encode_pairs(
    tokenizer: Any, pairs: Sequence[Pair], system: str | None, max_tokens: int
) -> tuple[list[dict[str, list[int]]], int]:
    """Tokens of pairs: rows with `prompt_ids`, `chosen_ids` and `rejected_ids`, and the number of pairs dropped.

    Args:
        tokenizer: Tokenizer with a chat template.
        pairs: The preferences.
        system: System turn; None for the template's default, "" for an empty one.
        max_tokens: Where prompt + answer are cut; a pair with no answer left is dropped.

    Raises:
        InputError: Nothing is left to train on.
    """
    rows: list[dict[str, list[int]]] = []
    for pair in pairs:
        own, history = before_prompt(pair, system)
        prompt, chosen = encode_answer(tokenizer, pair.prompt, pair.chosen, own, history)
        _, rejected = encode_answer(tokenizer, pair.prompt, pair.rejected, own, history)
        room = max_tokens - len(prompt)
        if room > 0 and chosen and rejected:
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen[:room], "rejected_ids": rejected[:room]})
    if not rows:
        raise InputError(
            f"no pair of {len(pairs)} is left to train on",
            "give pairs, or raise max_tokens: their prompts alone are longer" if pairs else "give pairs",
        )
    return rows, len(pairs) - len(rows)


def train_dpo(
    *,
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    settings: DpoSettings,
    out: Path,
    system: str | None = None,
    lora: LoraSettings | None = None,
    progress: Progress | None = None,
    files: Mapping[str, str] | None = None,
) -> TrainingResult:
    """Trains an adapter, or all weights, on preference pairs and writes the result to `out`.

    The reference is the model as given: without the fresh adapter, or with its weights as before training. Its
    log-probabilities are computed once, before the first step. Resume as in `train_sft`.

    Args:
        model: A causal language model, or a PeftModel whose adapter is continued. Changed in place.
        tokenizer: Its tokenizer, with a chat template.
        pairs: The preferences.
        settings: Beta, steps, learning rate, batch (in pairs), seed, device, …
        out: Directory of the adapter, or of the model.
        system: System turn of every pair; None for the template's default, "" for an empty one.
        lora: A fresh adapter; None continues the model's own, or trains all weights if it has none.
        progress: Called after each step with `loss`, `margin` (of implicit rewards), `preference_accuracy`, ….
        files: More text files for `out`, by name.

    Returns:
        The trained model, where it was written, and the losses.

    Raises:
        InputError: No pairs, no chat template, an adapter that does not fit the model, or an unusable device.
    """
    from datasets import Dataset

    from resafe.checkpoints.precision import resolve_device
    from resafe.training.adapters import is_adapter, with_trainable
    from resafe.training.order import length_grouped_order
    from resafe.training.sft import run_training
    from resafe.training.trainers import dpo_trainer

    resolve_device(settings.device)
    rows, dropped = encode_pairs(tokenizer, pairs, system, settings.max_tokens)
    lengths = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    steps = settings.total_steps(len(rows))
    order = length_grouped_order(lengths, settings.batch_size, steps, settings.seed)
    used = sorted(set(order))  # a short run does not need the reference of pairs that it never sees
    rows, lengths = [rows[index] for index in used], [lengths[index] for index in used]
    places = {index: place for place, index in enumerate(used)}
    order = [places[index] for index in order]
    trained = with_trainable(model, lora, settings.seed)
    size = settings.batch_size

    def build(work: Path, callback: Any) -> Any:
        trainer = dpo_trainer(trained, tokenizer, Dataset.from_list(rows), settings, work, order, callback)
        if (
            is_adapter(trained) and "ref" in trained.peft_config
        ):  # TRL's copy of the adapter as given: used, and not to be saved
            trained.delete_adapter("ref")
        return trainer

    return run_training(
        kind="dpo",
        build=build,
        model=trained,
        tokenizer=tokenizer,
        settings=settings,
        out=out,
        content=rows_digest(rows),
        rows=len(rows),
        tokens=[sum(lengths[i] for i in order[at : at + size]) for at in range(0, len(order), size)],
        longest=max(len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows),
        dropped=dropped,
        progress=progress,
        files=files,
    )
