"""The Inspect solver that puts a question in its wrapper and joins a prefilled answer. Knows no judge and no set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inspect_ai.model import CachePolicy, ChatMessageAssistant, ChatMessageUser, GenerateConfigArgs, ModelOutput
from inspect_ai.model import get_model as active_model
from inspect_ai.solver import Generate, Solver, TaskState, solver

from resafe.evals.wrappers import wrap

Note = Callable[[str, str], None]
"""Told (question's id, response) as responses come."""


@solver
def ask(wrapper: str = "none", note: Note | None = None, cached: bool = False) -> Solver:
    """Asks each question as the wrapper says; the response is the whole of the last answer.

    Args:
        wrapper: A registered wrapper (`resafe.evals.wrappers`).
        note: Told each response.
        cached: Keep answers in Inspect's cache, for models behind endpoints; local ones have a store of their own.
    """

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        wrapped = wrap(wrapper, state.input_text)
        first, *others = wrapped.turns
        state.messages = [message for message in state.messages if message.role == "system"]
        settings: dict[str, Any] = {"cache": CachePolicy(expiry=None)} if cached else {}
        for place, turn in enumerate((first, *others)):
            state.messages.append(ChatMessageUser(content=turn))
            last = place == len(others)
            if last and wrapped.prefill:
                state.messages.append(ChatMessageAssistant(content=wrapped.prefill))
                settings |= _continuing(str(active_model()))
            state = await generate(state, **settings)
        if wrapped.prefill:
            _join(state, wrapped.prefill)
        if note is not None:
            note(str(state.sample_id), state.output.completion)
        return state

    return solve


def _continuing(model: str) -> GenerateConfigArgs:
    """What makes a server go on from the assistant's turn; ours does, and commercial APIs decide for themselves."""
    service = model.removeprefix("openai-api/").partition("/")[0]
    if service in ("vllm", "sglang"):
        return {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}}
    return {}


def _join(state: TaskState, prefill: str) -> None:
    """Makes the prefilled beginning part of the answer, once, in the output and in the conversation."""
    said = state.output.completion
    whole = said if said.startswith(prefill) else prefill + said
    metadata = {"prefill": prefill}
    joined = ModelOutput.from_content(state.output.model, whole, stop_reason=state.output.stop_reason)
    joined.usage, joined.metadata = state.output.usage, {**(state.output.metadata or {}), **metadata}
    state.output = joined
    del state.messages[-2:]
    state.messages.append(joined.message)
