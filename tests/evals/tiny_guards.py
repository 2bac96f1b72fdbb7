"""Tiny guard models of the real classes, made in the test: random, or scripted to say one thing after their prompt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PIECES = r"<\|?[\w]+\|?>|\s|\w+|[^\w\s]"
SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<bot>", "<|user|>", "<|assistant|>"]


def tokenizer_for(texts: list[str], whole: list[str] = [], template: str | None = None) -> Any:  # noqa: B006
    """Words, single spaces and marks of these texts, each `whole` text as one token; decodes to exactly the text."""
    pieces = sorted({piece for text in texts for piece in re.findall(PIECES, text)} - set(SPECIAL))
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *pieces])}
    for text in whole:
        vocabulary.setdefault(text, len(vocabulary))
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    inner.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[4:],
        model_max_length=2048,
    )
    found.chat_template = template
    return found


def config_for(name: str, size: int, **changes: Any) -> Any:
    """The configuration of a two-layer model of that class."""
    shape: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 1,
        **changes,
    }
    if name == "Llama4":
        text = {**shape, "intermediate_size_mlp": 64, "num_local_experts": 2, "interleave_moe_layer_step": 2}
        text["attention_chunk_size"] = 8192
        eyes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        eyes.update(image_size=28, patch_size=14, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
        return transformers.Llama4Config(text_config=text, vision_config=eyes)
    return getattr(transformers, f"{name}Config")(**shape)


CLASSES = {
    "Qwen3": "Qwen3ForCausalLM",
    "Llama": "LlamaForCausalLM",
    "Llama4": "Llama4ForConditionalGeneration",
    "Mistral": "MistralForCausalLM",
    "Gemma2": "Gemma2ForCausalLM",
    "Granite": "GraniteForCausalLM",
}


def save_model(name: str, path: Path, tokenizer: Any, script: list[tuple[str, str, float]] | None = None) -> Any:
    """Saves a model of that class and gives it back.

    Args:
        name: A key of `CLASSES`.
        path: Where it goes.
        tokenizer: Its tokenizer, saved beside it.
        script: (token, next token, strength): the layers then add nothing and the output follows the last token alone.
    """
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[name])(config_for(name, len(tokenizer))).eval()
    if script is not None:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "o_proj" in key or "down_proj" in key:
                    parameter.zero_()
            embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
            head.zero_()
            for token, following, strength in script:
                here, there = tokenizer.convert_tokens_to_ids([token, following])
                head[there] += strength * embedding[here] / embedding[here].norm()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def save_labels(path: Path, tokenizer: Any, labels: list[str]) -> Any:
    """A LlamaForSequenceClassification with several labels, as beaver-dam-7b is."""
    torch.manual_seed(1)
    names = dict(enumerate(labels))
    config = config_for("Llama", len(tokenizer), id2label=names, problem_type="multi_label_classification")
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def save_cost(path: Path, tokenizer: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A Llama with a scalar `score_head`, in the names and with the config of Safe RLHF's LlamaForScore."""
    torch.manual_seed(2)
    model = transformers.LlamaModel(config_for("Llama", len(tokenizer))).eval()
    model.config.architectures = ["LlamaForScore"]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    weight, bias = torch.randn(1, 64) / 4, torch.tensor([0.25])
    stored = {f"model.{name}": tensor for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(
        {**stored, "score_head.weight": weight, "score_head.bias": bias}, path / "model.safetensors", {"format": "pt"}
    )
    return model, weight, bias
