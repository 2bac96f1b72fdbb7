"""Answers to many prompts, as fast as one process allows. Knows nothing of tasks, judges or files.

Greedy ones equal ``model.generate(do_sample=False)`` on one prompt at a time in float32, text for text. Plain argmax:
penalties that a checkpoint's generation config asks for are left out, so that models are compared by one rule.
Sampled ones (`sampling.py`) do not depend on the batch either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache

from resafe.checkpoints.attention import short_attention
from resafe.checkpoints.output import output_of
from resafe.data.chat import answer_ending, render
from resafe.errors import InputError
from resafe.evals.batching import MAX_POSITIONS, measured_batch_size
from resafe.evals.kvcache import buffered_cache, can_share_prefix, keep_rows
from resafe.evals.sampling import Sampling, draw, uniforms

Progress = Callable[[int, int], None]
BatchSize = int | Literal["auto"]

_MIN_PREFIX = 4  # a shorter common beginning is not worth a forward pass of its own


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    system: str | None = None,
    max_new_tokens: int | Sequence[int] = 32,
    batch_size: BatchSize = 128,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Answers chat prompts, greedily or sampled.

    Prompts are sorted by length and padded on the left; tokens that all rendered prompts begin with (the system
    turn) go through the model once; a row that has ended leaves its batch at once.

    Args:
        model: A causal language model of transformers, or a PEFT model around one; runs on its own device.
        tokenizer: Its tokenizer, with a chat template.
        prompts: User turns, rendered with `resafe.data.chat.render`.
        system: As in `render`: None for the template's default system turn, "" for an empty one.
        max_new_tokens: Most tokens of an answer; one number, or one for each prompt.
        batch_size: Most prompts that run together. Batches of long prompts are smaller (2¹⁵ positions in all). "auto"
            takes the size that is fastest in a short measurement (`batching.py`).
        sampling: How tokens are drawn; None is greedy.
        progress: Called with (prompts done, prompts in all) whenever a prompt is done.

    Returns:
        The answers in the order of `prompts`, without special tokens.

    Raises:
        InputError: No chat template, an argument out of range, or as many limits as there are not prompts.
    """
    texts = [render(tokenizer, prompt, system) for prompt in prompts]
    return complete(
        model, tokenizer, texts, max_new_tokens=max_new_tokens, batch_size=batch_size, sampling=sampling,
        progress=progress,
    )  # fmt: skip


def complete(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int] = 32,
    batch_size: BatchSize = 128,
    sampling: Sampling | None = None,
    begun: Sequence[str] | None = None,
    wanted: Sequence[bool] | None = None,
    each: Callable[[int, str], None] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Continues texts that are rendered already, each ending where the answer begins; otherwise as `generate`.

    Special tokens come from the texts alone. Where a text ends in the beginning of its answer, `begun` has that
    beginning (else ""), so that the space between the two is not lost. `each` is called with (text's index, answer)
    as answers are ready; batches without a `wanted` text are left out, and the answers of their texts are empty.
    Raises InputError also for a text without tokens.
    """
    limits = _limits(max_new_tokens, len(texts))
    if not texts:
        _check_batch(batch_size)
        return []
    encoded = _encode(tokenizer, texts)

    def text_of(index: int, tokens: list[int]) -> str:
        head = tokenizer(begun[index], add_special_tokens=False)["input_ids"] if begun and begun[index] else []
        shown = len(tokenizer.decode(head, skip_special_tokens=True)) if head else 0
        return str(tokenizer.decode(head + tokens, skip_special_tokens=True))[shown:]

    answers = complete_tokens(
        model, tokenizer, encoded, limits, batch_size=batch_size, sampling=sampling, wanted=wanted,
        each=None if each is None else lambda index, tokens: each(index, text_of(index, tokens)), progress=progress,
    )  # fmt: skip
    return [text_of(index, answer) for index, answer in enumerate(answers)]


def complete_tokens(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    limits: Sequence[int],
    *,
    batch_size: BatchSize = 128,
    stops: frozenset[int] | None = None,
    ended: Callable[[int, list[int]], bool] | None = None,
    sampling: Sampling | None = None,
    wanted: Sequence[bool] | None = None,
    each: Callable[[int, list[int]], None] | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continues token sequences; otherwise as `complete`.

    Args:
        model: As in `generate`.
        tokenizer: Gives the padding token and, where `stops` is None, the tokens that end an answer.
        encoded: Token ids of each prompt, at least one.
        limits: Most tokens of each answer.
        batch_size: As in `generate`.
        stops: Tokens that end an answer and are not part of it; None is `stop_tokens`.
        ended: Asked with (prompt's index, answer so far) after each token; True ends the answer after that token.
        sampling: As in `generate`.
        wanted: As in `complete`.
        each: Called with (prompt's index, answer) as answers are ready.
        progress: As in `generate`.

    Returns:
        The answers' token ids, in the order of `encoded`.
    """
    _check_batch(batch_size)
    lengths = [len(ids) for ids in encoded]
    longest = max(len(ids) + limit for ids, limit in zip(encoded, limits, strict=True))
    answers: list[list[int]] = [[] for _ in encoded]
    with _evaluating(model), short_attention(model, longest):
        decoder = _decoder(model, tokenizer, list(encoded), stops)
        decoder.sampling = sampling
        if batch_size == "auto":
            batch_size = measured_batch_size(decoder, encoded, limits)
        done = 0
        for batch in _batches(lengths, list(limits), batch_size):
            if wanted is not None and not any(wanted[index] for index in batch):
                done += len(batch)
                continue
            decoder.ended = None if ended is None else _numbered(ended, batch)
            for row, tokens in decoder.run([encoded[i] for i in batch], [limits[i] for i in batch]):
                answers[batch[row]] = tokens
                done += 1
                if each is not None:
                    each(batch[row], tokens)
                if progress is not None:
                    progress(done, len(encoded))
    return answers


def _numbered(ended: Callable[[int, list[int]], bool], batch: list[int]) -> Callable[[int, list[int]], bool]:
    return lambda row, tokens: ended(batch[row], tokens)


def _check_batch(batch_size: BatchSize) -> None:
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size is {batch_size}", "give a number of prompts, at least 1, or auto")


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer.

    Those of the model's generation config, the tokenizer's end-of-sequence token, and the special token that the
    chat template puts after an assistant's turn (some tuned models have it in neither place).
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    found.add(tokenizer.eos_token_id)
    ending: list[int] = []
    if getattr(tokenizer, "chat_template", None):
        with suppress(IndexError):  # the template changes or drops the assistant's text
            ending = tokenizer(answer_ending(tokenizer), add_special_tokens=False)["input_ids"]
    if ending and ending[0] in tokenizer.all_special_ids:
        found.add(ending[0])
    return frozenset(int(token) for token in found if token is not None)


@dataclass
class _Decoder:
    """A model with what all batches of one call share."""

    model: Any
    config: Any
    stops: frozenset[int]
    pad: int
    prefix: list[int]
    takes_positions: bool
    shared: Cache | None = field(default=None)
    ended: Callable[[int, list[int]], bool] | None = field(default=None)
    sampling: Sampling | None = field(default=None)

    def __post_init__(self) -> None:
        if self.prefix:
            cache = buffered_cache(self.config, len(self.prefix))
            ids = torch.tensor([self.prefix], device=self.model.device)
            with output_of(self.model, lambda hidden: hidden[:, -1]):
                self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            self.shared = cache

    def run(self, rows: list[list[int]], limits: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Decodes one batch; yields (row, answer's token ids) as rows end."""
        ids, mask, positions, cache = self._start(rows, max(limits))
        filled = len(self.prefix) + ids.shape[1]
        members = list(range(len(rows)))  # the batch's rows now, by their place in `rows`
        answers: list[list[int]] = [[] for _ in rows]
        drawn, step = self._draws(rows, max(limits)), 0
        while True:
            logits = self._step(ids, mask[:, :filled], positions, cache)
            if self.sampling is None or drawn is None:
                chosen = logits.argmax(-1)
            else:
                chosen = draw(logits, drawn[members, step], self.sampling)
            step += 1
            alive = []
            for place, (row, token) in enumerate(zip(members, chosen.tolist(), strict=True)):
                if token not in self.stops:
                    answers[row].append(token)
                    if len(answers[row]) < limits[row] and not (self.ended and self.ended(row, answers[row])):
                        alive.append(place)
                        continue
                yield row, answers[row]
            if not alive:
                return
            positions = positions[:, -1:] + 1
            if len(alive) < len(members):
                order = keep_rows(cache, alive, len(members))
                members = [members[place] for place in order]
                index = torch.tensor(order, device=mask.device)
                mask, positions, chosen = mask[index], positions[index], chosen[index]
            ids = chosen[:, None]
            filled += 1

    def _start(self, rows: list[list[int]], room: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Cache]:
        """The batch after the prefix: ids and positions (rows, width), mask (rows, capacity), an empty cache."""
        shared = len(self.prefix)
        width = max(map(len, rows)) - shared
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.ones((len(rows), shared + width + room), dtype=torch.long)
        for place, row in enumerate(rows):
            start = width - (len(row) - shared)
            ids[place, start:] = torch.tensor(row[shared:])
            mask[place, shared : shared + start] = 0
        positions = (mask[:, : shared + width].cumsum(1) - 1).clamp(min=0)[:, shared:]
        cache = buffered_cache(self.config, shared + width + room, self.shared)
        device = self.model.device
        return ids.to(device), mask.to(device), positions.to(device), cache

    def _step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One forward pass; the logits of each row's next token, (rows, vocabulary)."""
        placed = {"position_ids": positions} if self.takes_positions else {}
        with output_of(self.model, lambda hidden: hidden[:, -1]):
            output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **placed)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _draws(self, rows: list[list[int]], most: int) -> torch.Tensor | None:
        """The uniform numbers of all rows and steps, (rows, most); None where decoding is greedy."""
        if self.sampling is None:
            return None
        return torch.stack([uniforms(row, most, self.sampling.seed) for row in rows])


def _decoder(model: Any, tokenizer: Any, encoded: list[list[int]], stops: frozenset[int] | None = None) -> _Decoder:
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    parameters = inspect.signature(inner.forward).parameters
    prefix = _common_prefix(encoded) if len(encoded) > 1 and can_share_prefix(inner.config) else []
    return _Decoder(
        model=model,
        config=inner.config,
        stops=stop_tokens(inner, tokenizer) if stops is None else stops,
        pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        prefix=prefix if len(prefix) >= _MIN_PREFIX else [],
        takes_positions="position_ids" in parameters,
    )


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for place, ids in enumerate(encoded):
        if not ids:
            raise InputError(f"prompt {place} has no tokens", "the chat template renders it as nothing")
    return encoded


def _limits(max_new_tokens: int | Sequence[int], count: int) -> list[int]:
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != count:
        raise InputError(f"{len(limits)} values of max_new_tokens for {count} prompts", "give one for each prompt")
    if any(limit < 1 for limit in limits):
        raise InputError(f"max_new_tokens is {min(limits)}", "give a number of tokens, at least 1")
    return limits


def _common_prefix(encoded: list[list[int]]) -> list[int]:
    """Tokens that all prompts begin with, leaving each at least one of its own."""
    first, last = min(encoded), max(encoded)
    most = min(map(len, encoded)) - 1
    for place, (a, b) in enumerate(zip(first[:most], last[:most], strict=True)):
        if a != b:
            return first[:place]
    return first[:most]


def _batches(lengths: list[int], limits: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices by falling length, so that too large a batch fails first; each batch within rows and positions."""
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = max(longest, lengths[index] + limits[index])
        if batch and (len(batch) == batch_size or longest * (len(batch) + 1) > MAX_POSITIONS):
            yield batch
            batch, longest = [], lengths[index] + limits[index]
        batch.append(index)
    yield batch


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Inference mode, with dropout off; the model's training flag is put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
