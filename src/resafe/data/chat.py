"""From a prompt to the text and tokens a chat model sees. The one place that applies a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resafe.data.items import Conversation, DialoguePair, Example, Pair, Turn
from resafe.errors import InputError


def messages(prompt: str, system: str | None, history: Sequence[Turn] = ()) -> list[dict[str, str]]:
    """The turns before the answer: `system` None leaves the template's default system turn, "" makes it empty."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    earlier = [{"role": role, "content": text} for role, text in history]
    return [*turns, *earlier, {"role": "user", "content": prompt}]


def before_prompt(item: Example | Pair, system: str | None) -> tuple[str | None, tuple[Turn, ...]]:
    """What comes before an item's prompt: its own system turn, or else the given one, and its earlier turns."""
    if not isinstance(item, Conversation | DialoguePair):
        return system, ()
    return (system if item.system is None else item.system), item.history


def render(tokenizer: Any, prompt: str, system: str | None = None, history: Sequence[Turn] = ()) -> str:
    """Renders a prompt with the model's chat template, ending where the assistant's answer begins.

    Raises:
        InputError: The tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the model's tokenizer has no chat template",
            "use an instruction-tuned model, or put a chat_template.jinja beside its tokenizer",
        )
    turns = messages(prompt, system, history)
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like: a system turn (Gemma), turns out of order
        raise InputError(f"the model's chat template refuses the turns: {error}", "leave out the system turn") from None
    return text


def answer_ending(tokenizer: Any, system: str | None = None) -> str:
    """What the template puts after an assistant's answer, up to and including the end-of-turn token.

    A model learns to stop only if this text is part of what it is trained on.
    """
    marker = "\u241f"
    turns = [*messages("x", system), {"role": "assistant", "content": marker}]
    rendered: str = tokenizer.apply_chat_template(turns, tokenize=False)
    ending = rendered.split(marker, 1)[1].rstrip("\n")
    return ending or str(tokenizer.eos_token or "")


def encode_answer(
    tokenizer: Any, prompt: str, response: str, system: str | None = None, history: Sequence[Turn] = ()
) -> tuple[list[int], list[int]]:
    """Tokens of (rendered prompt, answer with its ending); special tokens come from the template alone."""
    head = tokenizer(render(tokenizer, prompt, system, history), add_special_tokens=False)["input_ids"]
    tail = tokenizer(response + answer_ending(tokenizer, system), add_special_tokens=False)["input_ids"]
    return list(head), list(tail)


def encode_dialogue(
    tokenizer: Any, prompt: str, response: str, system: str | None, history: Sequence[Turn]
) -> list[tuple[list[int], list[int]]]:
    """A dialogue as (text before an answer, answer with its ending) for each of its answers, in order.

    Joined, the parts are the tokens of the whole dialogue, each answer as the model would have to write it. A template
    that shows earlier answers otherwise than it has them written (Qwen3 takes out their reasoning) does not let them
    be learnt in one pass: then only the last answer is a part of its own.
    """
    answers = [place for place, (role, _) in enumerate(history) if role == "assistant"]
    asked = [*((history[: at - 1], history[at - 1][1], history[at][1]) for at in answers), (history, prompt, response)]
    ending = answer_ending(tokenizer, system)
    parts: list[tuple[list[int], list[int]]] = []
    written = ""
    for before, question, answer in asked:
        text = render(tokenizer, question, system, before)
        if not text.startswith(written):
            head, tail = encode_answer(tokenizer, prompt, response, system, history)
            return [(head, tail)]
        head, tail = (
            list(tokenizer(piece, add_special_tokens=False)["input_ids"])
            for piece in (text[len(written) :], answer + ending)
        )
        parts.append((head, tail))
        written = text + answer + ending
    return parts
