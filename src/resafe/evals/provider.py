"""An Inspect model provider that serves a checkpoint in this process: ``resafe/<reference>``.

Inspect asks for one answer at a time; all that are in flight are collected and decoded together, sorted by length.
Knows nothing of tasks or scores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, modelapi
from inspect_ai.tool import ToolChoice, ToolInfo

from resafe.checkpoints.precision import Precision
from resafe.data.chat import render
from resafe.data.items import Turn
from resafe.errors import InputError
from resafe.evals.generation import BatchSize, Progress, complete
from resafe.evals.responses import Decoding, ResponseStore, speaker_digest
from resafe.evals.sampling import Sampling

_QUIET_S = 0.02  # requests of one wave follow each other faster than this
_PATIENCE_S = 60.0  # the same, while more requests are known to be coming
_CONNECTIONS = 100_000  # more than any set has questions: they are to be in flight together
_MAX_NEW_TOKENS = 256  # where neither the task nor the command line limits the answer


@dataclass(frozen=True)
class _Request:
    text: str
    begun: str  # how the answer begins; the end of `text`
    limit: int
    sampling: Sampling | None
    answer: asyncio.Future[str]


@modelapi(name="resafe")
class LocalModel(ModelAPI):
    """A local checkpoint behind Inspect's model interface.

    Greedy unless the task or the command line gives a temperature. One user turn with at most one system turn before
    it is rendered by `resafe.data.chat.render`, other conversations by the chat template. A conversation that ends in
    an assistant's turn has that turn continued (prefill): the answer is what follows it.

    Args:
        model_name: A checkpoint reference (``inspect eval ... --model resafe/<reference>``), or any name if `loaded`
            or `load` is given.
        base_url: Not used.
        api_key: Not used.
        config: Inspect's configuration of the model.
        loaded: An already loaded model; then `tokenizer` is needed too. It decodes in the thread that runs the
            evaluation, one that is loaded here (for `inspect eval`) in another.
        tokenizer: Its tokenizer.
        system: System turn of conversations without one: None for the template's default, "" for an empty one.
        batch_size: Most prompts that are decoded together; "auto" measures.
        device: Where a referenced checkpoint is loaded.
        dtype: Its precision there: "auto", "float32" or "bfloat16" (`-M dtype=float32`).
        expected: How many requests will come, if known: decoding then waits for them. Several numbers are waves, of
            which one comes after the answers to the one before (conversations of several turns).
        progress: Called with (done, expected or known so far) as answers are ready.
        load: In place of `loaded`: gives the model when the first answer is not in the store.
        store: Where answers are kept and looked up; or the directory of such stores (`-M store=DIR`).
        precision: The dtype's name that answers are stored under, with `loaded` or `load`.
        whole_batches: Decode every batch in which an answer is missing as a whole, so that in bfloat16, too, answers
            after a resume are those of a run that was never cut short; else only what is missing.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  (Inspect passes one in; never changed here)
        *,
        loaded: Any = None,
        tokenizer: Any = None,
        system: str | None = None,
        batch_size: BatchSize = 128,
        device: str = "cpu",
        dtype: Precision = "auto",
        expected: int | Sequence[int] = 0,
        progress: Progress | None = None,
        load: Callable[[], Any] | None = None,
        store: ResponseStore | str | None = None,
        precision: str = "",
        whole_batches: bool = False,
    ) -> None:
        """Opens the referenced checkpoint, unless a model is given."""
        super().__init__(model_name, base_url, api_key, [], config)
        if (loaded is None and load is None) != (tokenizer is None):
            raise InputError("only one of model and tokenizer was given", "pass both, or a checkpoint reference")
        self._display = tokenizer is None
        if tokenizer is None:
            from resafe.checkpoints import load_model, load_tokenizer, open_checkpoint, resolve_dtype

            checkpoint = open_checkpoint(model_name)
            load, tokenizer = lambda: load_model(checkpoint, dtype=dtype, device=device), load_tokenizer(checkpoint)
            precision = str(resolve_dtype(dtype, device)).removeprefix("torch.")
            store = ResponseStore(Path(store), speaker_digest(checkpoint)) if isinstance(store, str) else store
        elif isinstance(store, str):
            raise InputError("a directory of stores was given for a model in memory", "pass the model's ResponseStore")
        self.model: Any = loaded
        self.tokenizer: Any = tokenizer
        self.system, self.batch_size = system, batch_size
        self._waves = list(accumulate([expected] if isinstance(expected, int) else expected))
        self.progress = progress
        self._load, self._store, self._precision, self._whole = load, store, precision, whole_batches
        self.reused = 0
        self._done = 0
        self._pending: list[_Request] = []
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def max_connections(self) -> int:
        """More than there are questions, so that Inspect holds none back."""
        return _CONNECTIONS

    def release(self) -> None:
        """Lets go of the weights: Inspect keeps its last models, and a run evaluates many one after another."""
        self.model = self.tokenizer = self._load = None

    def connection_key(self) -> str:
        """One pool of connections for each model."""
        return f"resafe/{self.model_name}"

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answers one conversation, together with all others that are waiting.

        Raises:
            InputError: Tools are asked for, which plain local models do not have.
        """
        if tools:
            raise InputError("the task offers tools to a resafe model", "choose a task without tools")
        limit = config.max_tokens or _MAX_NEW_TOKENS
        answer = asyncio.get_running_loop().create_future()
        begun = input[-1].text if input and input[-1].role == "assistant" else ""
        request = _Request(self._render(input), begun, limit, _sampling(config), answer)
        self._pending.append(request)
        if self._worker is None or self._worker.done():
            self._arrived = asyncio.Event()  # belongs to the event loop of this run
            self._worker = asyncio.create_task(self._serve())
        self._arrived.set()
        return ModelOutput.from_content(self.model_name, await request.answer)

    def _render(self, conversation: list[ChatMessage]) -> str:
        turns = [(message.role, message.text) for message in conversation]
        prefill = turns.pop()[1] if turns and turns[-1][0] == "assistant" else ""
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else self.system
        if not turns or turns[-1][0] != "user":
            raise InputError("a conversation has no user turn before its answer", "end it in one")
        history: list[Turn] = [(role, text) for role, text in turns[:-1]]
        return render(self.tokenizer, turns[-1][1], system, history) + prefill

    async def _serve(self) -> None:
        """Decodes wave after wave until no request is waiting."""
        while self._pending:
            await self._gather()
            # In an order of their own: which of the tasks that run beside each other asks first is left to chance, and
            # in bfloat16 a row's company in its batch decides between tokens that are almost equally likely.
            wave, self._pending = sorted(self._pending, key=lambda request: (request.text, request.limit)), []
            try:
                # Another thread keeps Inspect's display alive. It also gets OpenMP threads of its own, and once these
                # outnumber the cores all of them wait passively, in training too: 1.4 times as slow as measured.
                answers = await asyncio.to_thread(self._decode, wave) if self._display else self._decode(wave)
            except Exception as error:  # handed to every sample of the wave, which Inspect then reports
                for request in wave:
                    if not request.answer.done():
                        request.answer.set_exception(error)
                continue
            self._done += len(wave)
            for request, answer in zip(wave, answers, strict=True):
                if not request.answer.done():  # cancelled meanwhile
                    request.answer.set_result(answer)

    async def _gather(self) -> None:
        """Returns once all expected requests are there, or no new one has come for a while."""
        while True:
            ahead = next((wave for wave in self._waves if wave > self._done), 0)
            missing = ahead - self._done - len(self._pending)
            if ahead and missing == 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), _PATIENCE_S if missing > 0 else _QUIET_S)
            except TimeoutError:
                return

    def _decode(self, wave: list[_Request]) -> list[str]:
        """The wave's answers: stored ones as they are, the others decoded, kinds of decoding one after another."""
        found: dict[int, str] = {}
        keys = [self._key(request) for request in wave]
        for place, key in enumerate(keys):
            stored = None if key is None or self._store is None else self._store.get(key)
            if stored is not None:
                found[place] = stored
        known = frozenset(found)
        self.reused += len(known)
        self._report(len(found), len(wave))
        kinds = dict.fromkeys(request.sampling for request in wave)
        for kind in kinds:
            places = [place for place, request in enumerate(wave) if request.sampling == kind]
            missing = [place for place in places if place not in known]
            if missing and not self._whole and self._store is not None:  # equal requests are answered once
                missing = list({keys[place]: place for place in missing}.values())
            if missing:
                self._complete(wave, places if self._whole else missing, kind, keys, known, found)
        by_key = {keys[place]: answer for place, answer in found.items()}
        return [found[place] if place in found else by_key[keys[place]] for place in range(len(wave))]

    def _complete(
        self, wave: list[_Request], places: list[int], kind: Sampling | None, keys: list[str | None],
        known: frozenset[int], found: dict[int, str],
    ) -> None:  # fmt: skip
        """Decodes the requests at `places`; what is not yet in `found` is stored as it comes and put there."""
        if self.model is None and self._load is not None:
            self.model = self._load()

        ready = len(found)

        def each(index: int, answer: str) -> None:
            nonlocal ready
            if places[index] in known:
                return
            key = keys[places[index]]
            if self._store is not None and key is not None:
                self._store.put(key, answer)
            ready += 1
            self._report(ready, len(wave))

        answers = complete(
            self.model,
            self.tokenizer,
            [wave[place].text for place in places],
            max_new_tokens=[wave[place].limit for place in places],
            batch_size=self.batch_size,
            begun=[wave[place].begun for place in places],
            sampling=kind,
            wanted=[place not in known for place in places],
            each=each,
        )
        for place, answer in zip(places, answers, strict=True):
            if place not in known:
                found[place] = answer

    def _report(self, done: int, wave: int) -> None:
        if self.progress is not None and done > 0:
            self.progress(self._done + done, max(self._waves[-1], self._done + wave))

    def _key(self, request: _Request) -> str | None:
        """What the answer is stored under, or None without a store."""
        if self._store is None:
            return None
        kind = request.sampling
        drawn = (kind.temperature, kind.top_k, kind.top_p, kind.seed) if kind else ()
        return self._store.key(request.text, Decoding(request.limit, self._precision, *drawn))


def _sampling(config: GenerateConfig) -> Sampling | None:
    if not config.temperature:
        return None
    return Sampling(config.temperature, config.top_k or 0, config.top_p or 1.0, config.seed or 0)
