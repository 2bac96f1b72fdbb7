"""A whole recipe in seconds: a random two-layer chat model over the words of the shipped data, nothing downloaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

SPECIAL = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 480


def words() -> list[str]:
    """The most frequent words of the shipped requests, answers and tasks."""
    from resafe.data.embedded import harmful_rows, harmless_rows
    from resafe.data.questions import task_examples

    texts = [text for row in harmful_rows() for text in (row.prompt, row.refusal, row.compliance)]
    texts += [text for row in harmless_rows() for text in (row.prompt, row.response)]
    texts += [
        text
        for task in ("arithmetic", "extraction")
        for e in task_examples(task, 100)
        for text in (e.prompt, e.response)
    ]
    counts = Counter(word for text in texts for word in text.split())
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if word not in SPECIAL]


def make_tokenizer() -> Any:
    """One token a word, and a ChatML template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words()][:VOCABULARY])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(seed: int = 0, vocabulary: int = VOCABULARY) -> Any:
    """Two layers of width 32, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_chat_model(directory: Path, seed: int = 0, vocabulary: int = VOCABULARY, **options: Any) -> Path:
    """A model directory as transformers writes it, with its tokenizer."""
    make_model(seed, vocabulary).save_pretrained(directory, **options)
    make_tokenizer().save_pretrained(directory)
    return directory


def tiny_recipe(model: Path) -> dict[str, Any]:
    """A recipe with every kind of entry: a mask, a control that follows it, interpolation, two tasks fused."""
    return {
        "name": "tiny",
        "title": "A tiny run",
        "device": "cpu",
        "dtype": "float32",
        "model": {"reference": str(model), "system": ""},
        "data": {"safety_limit": 40, "harmless_limit": 40},
        "align": {
            "refusal_share": 0.5,
            "lora": {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]},
            "sft": {"steps": 8, "learning_rate": 0.03, "batch_size": 8, "warmup_steps": 1, "max_tokens": 80},
        },
        "tune": {
            "first": {
                "task": "arithmetic", "examples": 40, "harmful_share": 0.2, "steps": 5, "learning_rate": 0.02,
                "batch_size": 8, "max_tokens": 80,
            },
            "second": {
                "task": "extraction", "examples": 24, "steps": 3, "learning_rate": 0.02, "batch_size": 8,
                "max_tokens": 80,
            },
        },
        "realign": {
            "mask": {
                "method": "somf", "kind": "realigned", "title": "Learned mask", "tuned": ["first"],
                "settings": {"steps": 13, "batch_size": 8, "strengths": [0.5, 1.0], "warm_share": 0.02},
            },
            "random": {"method": "random_mask", "tuned": ["first"], "keep_rate_of": "mask"},
            "half": {"method": "interpolation", "tuned": ["first"], "settings": {"removed": [0.5]}},
            "fused": {
                "method": "interpolation", "kind": "realigned", "tuned": ["first", "second"], "strength": 0.4,
                "fusion": {"name": "average"},
            },
        },
        "questions": {
            "harmful_limit": 14,
            "harmless_limit": 12,
            "task_items": 8,
            "max_new_tokens": 6,
            "task_max_new_tokens": 8,
            "validation": {"harmful": 5, "harmless": 4, "task": 4, "max_new_tokens": 4},
        },
    }  # fmt: skip
