"""A tiny random chat model and its tokenizer, made in the test: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = ["<unk>", "<pad>", "<eos>", "<end>", "<system>", "<user>", "<bot>"]
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<system> w1 w2 w3 w4 <end> {% endif %}"
    "{% for m in messages %}<{{ 'bot' if m['role'] == 'assistant' else m['role'] }}> {{ m['content'] }} <end> "
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def tiny_tokenizer() -> Any:
    """Words w0 to w89 and a chat template whose default system turn is four words long."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[3:],
        padding_side="left",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    """A two-layer Llama in float32 with grouped heads; weights large enough that answers vary with the prompt."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def windowed(window: int | None, like: Any = None) -> Any:
    """A Mistral with the weights of a Llama (by default a tiny one), whose attention reaches back over a window."""
    llama = like or tiny_model(initializer_range=0.2)
    settings = {
        key: value for key, value in llama.config.to_dict().items() if key not in ("model_type", "architectures")
    }
    model = MistralForCausalLM(MistralConfig(**settings, sliding_window=window)).eval()
    model.load_state_dict(llama.state_dict())
    return model


def ragged_prompts(count: int) -> list[str]:
    """Prompts of 1 to 12 words, in no order of length."""
    return [" ".join(WORDS[(7 * i + 5 * j) % 90] for j in range(1 + (i * 5) % 12)) for i in range(count)]
