"""Hidden states of a local language model as features: what its first layers make of a response to its question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from resafe.errors import InputError
from resafe.evals.judge import Judged

if TYPE_CHECKING:
    import torch

PROMPT_TOKENS, RESPONSE_TOKENS = 64, 128  # read of each; 128 tokens hold 95 % of the published sets' responses whole
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class LocalModel:
    """The first layers of a causal language model.

    Attributes:
        reference: The checkpoint, as `open_checkpoint` takes it.
        digest: The digest of its weights; other weights at that place are refused.
        layer: Layers that are run; the rest of the model is not.
    """

    reference: str
    digest: str
    layer: int

    @classmethod
    def open(cls, reference: str, layer: int | None = None) -> LocalModel:
        """Finds the model; half of its layers unless told otherwise.

        Raises:
            InputError: No such model, or it has not that many layers.
        """
        from resafe.checkpoints import open_checkpoint

        if not Path(reference).expanduser().exists():  # BASE+ADAPTER: each is a place, or an id
            reference = "+".join(map(_absolute, reference.split("+")))
        reference = _absolute(reference)
        checkpoint = open_checkpoint(reference)
        config = (checkpoint.base or checkpoint).config
        layers = int(config.get("num_hidden_layers", 0))
        if layers < 1:
            raise InputError(f"{reference}: its config.json names no num_hidden_layers", "give a causal language model")
        if layer is not None and not 1 <= layer <= layers:
            raise InputError(f"{reference}: layer {layer} of {layers}", f"give a layer from 1 to {layers}")
        return cls(reference, checkpoint.digest, (layers + 1) // 2 if layer is None else layer)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from torch import nn

        from resafe.checkpoints import load_model, load_tokenizer, open_checkpoint

        checkpoint = open_checkpoint(self.reference)
        if checkpoint.digest != self.digest:
            raise InputError(
                f"{self.reference} is not the model that the judge was trained with", "train the judge again with it"
            )
        whole: Any = load_model(checkpoint, dtype="auto")
        body = whole.get_decoder()
        if not hasattr(body, "layers") or not hasattr(body, "norm"):
            raise InputError(f"{self.reference}: layers of a {type(body).__name__} cannot be left out", "use a Llama")
        body.layers = body.layers[: self.layer]
        body.norm = nn.Identity()
        return body, load_tokenizer(checkpoint)

    def states(
        self, items: Sequence[Judged], say: Callable[[int, int], None] = lambda done, asked: None
    ) -> NDArray[np.float64]:
        """The mean over a response's tokens of the last of the layers, before any norm.

        Args:
            items: Responses with their prompts.
            say: Gets the numbers done and asked after each batch.

        Returns:
            Shape (items, width of the model); zeros for a response without a token.
        """
        import torch

        body, tokenizer = self._loaded
        found = np.zeros((len(items), int(body.config.hidden_size)))
        texts = _encode(tokenizer, items)
        order = sorted((n for n in range(len(items)) if texts[n][1]), key=lambda n: -sum(map(len, texts[n])))
        start = 0
        while start < len(order):
            width = sum(map(len, texts[order[start]]))
            batch = order[start : start + max(1, BATCH_TOKENS // width)]
            with torch.inference_mode():
                found[batch] = _pooled(body, [texts[n] for n in batch], width).double().numpy()
            start += len(batch)
            say(start, len(order))
        return found


def _absolute(reference: str) -> str:
    """A path as it holds in other working directories, where the judge is used too; ids as they are."""
    place = Path(reference).expanduser()
    return str(place.resolve()) if place.exists() else reference


def _encode(tokenizer: Any, items: Sequence[Judged]) -> list[tuple[list[int], list[int]]]:
    """Token ids of the question with its frame, and of the response."""

    def ids(texts: Sequence[str], most: int) -> list[list[int]]:
        found = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=most)
        return list(found.input_ids)

    if not items:
        return []
    chat = "<|im_start|>" in tokenizer.get_vocab()
    frame = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n") if chat else ("Question: ", "\nAnswer: ")
    before, between = ids(frame, PROMPT_TOKENS)
    prompts = ids([item.prompt for item in items], PROMPT_TOKENS)
    responses = ids([item.response.strip() for item in items], RESPONSE_TOKENS)
    return [([*before, *prompt, *between], list(response)) for prompt, response in zip(prompts, responses, strict=True)]


def _pooled(body: Any, texts: Sequence[tuple[list[int], list[int]]], width: int) -> torch.Tensor:
    """Means over the response's tokens, shape (texts, hidden size), float32."""
    import torch

    # Padded on the right, where causal attention never looks: no mask is needed.
    tokens = torch.zeros(len(texts), width, dtype=torch.long)
    read = torch.zeros(len(texts), width)
    for row, (question, response) in enumerate(texts):
        end = len(question) + len(response)
        tokens[row, :end] = torch.tensor([*question, *response])
        read[row, len(question) : end] = 1
    states = body(input_ids=tokens, use_cache=False).last_hidden_state.float()
    pooled: torch.Tensor = (states * read[:, :, None]).sum(1) / read.sum(1, keepdim=True)
    return pooled


__all__ = ["LocalModel"]
