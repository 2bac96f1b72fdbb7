"""An Inspect model provider that serves a checkpoint in this process: ``resafe/<reference>``.

Inspect asks for one answer at a time; all that are in flight are collected and decoded together, sorted by length.
Knows nothing of tasks or scores.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, modelapi
from inspect_ai.tool import ToolChoice, ToolInfo

from resafe.checkpoints.precision import Precision
from resafe.data.chat import render
from resafe.errors import InputError
from resafe.evals.generation import Progress, complete

_QUIET_S = 0.02  # requests of one wave follow each other faster than this
_PATIENCE_S = 60.0  # the same, while more requests are known to be coming
_CONNECTIONS = 100_000  # more than any set has questions: they are to be in flight together
_MAX_NEW_TOKENS = 256  # where neither the task nor the command line limits the answer


@dataclass(frozen=True)
class _Request:
    text: str
    limit: int
    answer: asyncio.Future[str]


@modelapi(name="resafe")
class LocalModel(ModelAPI):
    """A local checkpoint behind Inspect's model interface.

    Decoding is greedy whatever the task's temperature. One user turn with at most one system turn before it is
    rendered by `resafe.data.chat.render`, other conversations by the chat template.

    Args:
        model_name: A checkpoint reference (``inspect eval ... --model resafe/<reference>``), or any name if `loaded`
            is given.
        base_url: Not used.
        api_key: Not used.
        config: Inspect's configuration of the model.
        loaded: An already loaded model; then `tokenizer` is needed too. It decodes in the thread that runs the
            evaluation, one that is loaded here (for `inspect eval`) in another.
        tokenizer: Its tokenizer.
        system: System turn of conversations without one: None for the template's default, "" for an empty one.
        batch_size: Most prompts that are decoded together.
        device: Where a referenced checkpoint is loaded.
        dtype: Its precision there: "auto", "float32" or "bfloat16" (`-M dtype=float32`).
        expected: How many requests will come in all, if known: decoding then waits for them.
        progress: Called with (done, expected or known so far) as answers are ready.
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
        batch_size: int = 128,
        device: str = "cpu",
        dtype: Precision = "auto",
        expected: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Loads the referenced checkpoint, unless a loaded model is given."""
        super().__init__(model_name, base_url, api_key, [], config)
        if (loaded is None) != (tokenizer is None):
            raise InputError("only one of model and tokenizer was given", "pass both, or a checkpoint reference")
        self._display = loaded is None
        if loaded is None:
            from resafe.checkpoints import load_model, load_tokenizer, open_checkpoint

            checkpoint = open_checkpoint(model_name)
            loaded, tokenizer = load_model(checkpoint, dtype=dtype, device=device), load_tokenizer(checkpoint)
        self.model: Any = loaded
        self.tokenizer: Any = tokenizer
        self.system, self.batch_size = system, batch_size
        self.expected, self.progress = expected, progress
        self._done = 0
        self._pending: list[_Request] = []
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def max_connections(self) -> int:
        """More than there are questions, so that Inspect holds none back."""
        return _CONNECTIONS

    def release(self) -> None:
        """Lets go of the weights: Inspect keeps its last models, and a run evaluates many one after another."""
        self.model = self.tokenizer = None

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
        request = _Request(self._render(input), limit, asyncio.get_running_loop().create_future())
        self._pending.append(request)
        if self._worker is None or self._worker.done():
            self._arrived = asyncio.Event()  # belongs to the event loop of this run
            self._worker = asyncio.create_task(self._serve())
        self._arrived.set()
        return ModelOutput.from_content(self.model_name, await request.answer)

    def _render(self, conversation: list[ChatMessage]) -> str:
        turns = [(message.role, message.text) for message in conversation]
        roles = [role for role, _ in turns]
        if roles == ["user"]:
            return render(self.tokenizer, turns[0][1], self.system)
        if roles == ["system", "user"]:
            return render(self.tokenizer, turns[1][1], turns[0][1])
        if self.system is not None and "system" not in roles:
            turns.insert(0, ("system", self.system))
        text = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            tokenize=False,
            add_generation_prompt=True,
        )
        return str(text)

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
            missing = self.expected - self._done - len(self._pending)
            if self.expected and missing == 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), _PATIENCE_S if missing > 0 else _QUIET_S)
            except TimeoutError:
                return

    def _decode(self, wave: list[_Request]) -> list[str]:
        before, total = self._done, max(self.expected, self._done + len(wave))
        report = self.progress

        def progress(done: int, _: int) -> None:
            if report is not None:
                report(before + done, total)

        return complete(
            self.model,
            self.tokenizer,
            [request.text for request in wave],
            max_new_tokens=[request.limit for request in wave],
            batch_size=self.batch_size,
            progress=progress,
        )
