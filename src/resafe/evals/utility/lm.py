"""A loaded model as a model of lm-eval: its tokenisation and rules, our passes through the network.

Log-likelihoods go through trees of tokens (`trie.py`), greedy answers through our decoder (`evals.generation`). What
they cannot do (sampling, sliding windows, other architectures) is left to lm-eval's own code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from resafe.evals.generation import complete_tokens
from resafe.evals.utility.trie import can_use_rows, loglikelihoods

_TRIAL = 4  # sequences that are scored both ways before trees are trusted
_TOLERANCE = {"float32": 2e-3, "float64": 1e-6}  # of a sum of log-probabilities, relative; lower precisions get 0.05

Progress = Callable[[int, int], None]


class LoadedLM(HFLM):  # type: ignore[misc]  # the library has no types
    """lm-eval's model around a causal language model in memory, or a PEFT model around one.

    Args:
        model: In evaluation mode, on its device.
        tokenizer: Its tokenizer.
        batch_size: Most prompts that are decoded together, and lm-eval's batch size where its own code runs.
        progress: Called with (requests done, requests in all).
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32, progress: Progress | None = None) -> None:
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # that a loaded model ignores the arguments of one to load
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        finally:
            logging.disable(disabled)
        self._progress = progress
        self._rows: bool | None = None if can_use_rows(model) else False
        self._encode = lru_cache(maxsize=4096)(self._encode_text)

    def _encode_text(self, text: str, special: bool | None) -> tuple[int, ...]:
        return tuple(super().tok_encode(text, add_special_tokens=special))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """As lm-eval's; a context is encoded once for all its answers."""
        ids = list(self._encode(string, add_special_tokens))
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        sequences = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-(self.max_length + 1) :]
            sequences.append((ids, min(len(continuation), len(ids) - 1)))
        if self._rows is None and requests:
            self._rows = self._agrees(requests, sequences)
        if not self._rows:
            return list(super()._loglikelihood_tokens(list(requests), disable_tqdm=True, override_bs=override_bs))
        results = loglikelihoods(self.model, sequences, self._counter(len(requests)))
        for request, result in zip(requests, results, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def _agrees(self, requests: Sequence[Any], sequences: list[tuple[list[int], int]]) -> bool:
        """Whether trees give what lm-eval's own code gives, on the first few requests."""
        tolerance = _TOLERANCE.get(str(self.model.dtype).removeprefix("torch."), 0.05)
        ours = loglikelihoods(self.model, sequences[:_TRIAL])
        theirs = super()._loglikelihood_tokens(list(requests[:_TRIAL]), disable_tqdm=True, override_bs=_TRIAL)
        return all(abs(a - b) <= tolerance * max(1.0, abs(b)) for (a, _), (b, _) in zip(ours, theirs, strict=True))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the first stop sequence; requests that sample go through lm-eval's own code."""
        settings = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        ours = all(not kwargs.get("do_sample") and not set(kwargs) - _GREEDY for kwargs in settings)
        if not ours or self.think_end_token or not _plain(self.model):
            return list(super().generate_until(requests, disable_tqdm=True))
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = [handle_stop_sequences(list(kwargs["until"]), eos=end) for kwargs in settings]
        limits = [int(kwargs["max_gen_toks"]) for kwargs in settings]
        prompts = [
            self.tok_encode(request.args[0], left_truncate_len=self.max_length - limit)
            for request, limit in zip(requests, limits, strict=True)
        ]
        count = self._counter(len(requests))

        def ended(index: int, tokens: list[int]) -> bool:
            # The last tokens decide: a stop sequence that was complete before would have ended the answer then.
            tail = self.tok_decode(tokens[-_TAIL:])
            return any(stop and stop in tail for stop in stops[index])

        answers = complete_tokens(
            self.model, self.tokenizer, prompts, limits, batch_size=self.batch_size, ended=ended,
            stops=_end_tokens(self.model, self.eot_token_id), progress=lambda done, total: count(1),
        )  # fmt: skip
        texts = []
        for request, tokens, stop in zip(requests, answers, stops, strict=True):
            text = postprocess_generated_text(self.tok_decode(tokens), stop, None)
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _counter(self, total: int) -> Callable[[int], None]:
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            if self._progress is not None:
                self._progress(done, total)

        return count


_GREEDY = {"do_sample", "temperature", "until", "max_gen_toks"}
_TAIL = 24  # tokens: more than a stop sequence has


def _plain(model: Any) -> bool:
    """Whether the checkpoint's generation config asks for nothing that changes a greedy answer."""
    config = getattr(model, "generation_config", None)
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_new_tokens": 0}
    return all(getattr(config, name, None) in (None, value) for name, value in neutral.items())


def _end_tokens(model: Any, own: int | None) -> frozenset[int]:
    """Tokens that end an answer in transformers' `generate`: those of the generation config, and lm-eval's own stop."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return frozenset(int(token) for token in {*found, own} if token is not None)
