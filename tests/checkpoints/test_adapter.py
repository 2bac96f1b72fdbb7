"""Adapters and their bases: the modules they change, and what does not fit."""

from __future__ import annotations

import dataclasses

import pytest

from resafe.checkpoints import adapter_modules, base_tensor, check_adapter_fits, check_same_shapes, open_checkpoint
from resafe.checkpoints.adapter import base_reference, check_shapes_fit, over_experts
from resafe.errors import InputError
from tests.checkpoints.conftest import make_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_modules_of_peft_names():
    names = [
        f"{Q}.lora_A.weight",
        f"{Q}.lora_B.weight",
        f"{Q}.lora_B.bias",
        f"{Q}.lora_magnitude_vector",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.lm_head.weight",
    ]
    found = adapter_modules(names)
    assert list(found) == ["model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head"]
    assert dict(found["model.layers.0.self_attn.q_proj"].parts) == {
        "lora_A": names[0],
        "lora_B": names[1],
        "lora_B.bias": names[2],
        "lora_magnitude_vector": names[3],
    }
    assert dict(found["model.embed_tokens"].parts) == {"lora_embedding_A": names[4], "weight": names[5]}
    assert dict(found["lm_head"].parts) == {"weight": names[6]}


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["lm_head"]},
    ],
)
def test_what_peft_writes_fits(made, tmp_path, settings):
    make_adapter(made / "base", tmp_path / "adapter", **settings)
    opened = open_checkpoint(tmp_path / "adapter")
    check_adapter_fits(opened, opened.base)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_an_adapter_over_merged_experts_fits(tmp_path, kind):
    """PEFT's all-linear reaches the experts, which transformers makes one tensor of and the files hold one by one."""
    import transformers
    from peft import LoraConfig, get_peft_model

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    own = {"Mixtral": {"num_local_experts": 2}, "Qwen3Moe": {"num_experts": 2, "moe_intermediate_size": 16}}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes, **own[kind]))
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    adapter = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert any(over_experts(module) for module in adapter_modules(list(adapter.tensors)))
    gate = base_tensor("model.layers.0.mlp.gate", adapter.base)  # which Mixtral's files call otherwise
    assert gate is not None and gate.endswith(".gate.weight")


def test_another_base_is_refused(made):
    with pytest.raises(InputError) as caught:
        open_checkpoint(f"{made / 'other'}+{made / 'adapter'}")
    message = caught.value.message
    assert "adapter of another base" in message
    assert "model.layers.0.mlp.down_proj.lora_A.weight" in message
    assert (
        "it changes a weight of shape (32, 48), the base's model.layers.0.mlp.down_proj.weight has (16, 48)" in message
    )
    assert message.count("it changes") == 4  # two layers, two modules
    with pytest.raises(InputError, match="adapter of another base"):
        check_same_shapes(open_checkpoint(made / "other"), open_checkpoint(made / "adapter"))


def fits(made, shapes, **config):
    check_shapes_fit(shapes, {"peft_type": "LORA", **config}, open_checkpoint(made / "base"), "here")


def test_problems_by_name(made):
    cases = [
        ({f"{Q}.lora_A.weight": (4, 32)}, "lora_A has no lora_B"),
        ({f"{Q}.lora_B.weight": (32, 4)}, "lora_B has no lora_A"),
        ({f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": (32, 3)}, "do not share a rank"),
        ({"base_model.model.x.lora_A.weight": (4, 32), "base_model.model.x.lora_B.weight": (32, 4)}, "has no module x"),
        ({"base_model.model.lm_head.weight": (65, 32)}, "the base has no lm_head.weight"),
        (
            {"base_model.model.model.norm.weight": (31,)},
            "it replaces model.norm.weight by shape (31,), the base has (32,)",
        ),
        ({f"{Q}.bias": (32,)}, "the base has no model.layers.0.self_attn.q_proj.bias"),
    ]
    for shapes, says in cases:
        with pytest.raises(InputError) as caught:
            fits(made, shapes)
        assert f"{next(iter(shapes))}: " in caught.value.message
        assert says in caught.value.message
    many = {f"base_model.model.m{at}.weight": (1,) for at in range(13)}
    with pytest.raises(InputError, match="and 3 more"):
        fits(made, many)


def test_transposed_and_unchecked_kinds(made):
    down = "base_model.model.model.layers.0.mlp.down_proj"  # base weight (32, 48)
    transposed = {f"{down}.lora_A.weight": (4, 32), f"{down}.lora_B.weight": (48, 4)}
    fits(made, transposed, fan_in_fan_out=True)
    with pytest.raises(InputError, match="shape"):
        fits(made, transposed, fan_in_fan_out=False)
    strange = {"base_model.model.x.weight": (1,)}
    fits(made, strange, peft_type="IA3")
    fits(made, strange, layer_replication=[[0, 2]])
    experts = "base_model.model.model.layers.0.mlp"
    fits(made, {f"{experts}.lora_A.weight": (4, 1)}, target_parameters=["mlp.x"])


def test_base_tensor_names(made):
    base = open_checkpoint(made / "base")
    assert base_tensor("model.norm", base) == "model.norm.weight"
    assert base_tensor("lm_head", base, (64, 32)) == "model.embed_tokens.weight"
    assert base_tensor("lm_head", base) is None
    assert base_tensor("lm_head", open_checkpoint(made / "untied"), (64, 32)) == "lm_head.weight"
    bare = {name.removeprefix("model."): info for name, info in base.tensors.items()}
    assert (
        base_tensor("model.layers.1.mlp.up_proj", dataclasses.replace(base, tensors=bare))
        == "layers.1.mlp.up_proj.weight"
    )


def test_base_reference(tmp_path):
    assert base_reference({}, tmp_path) is None
    assert base_reference({"base_model_name_or_path": " "}, tmp_path) is None
    assert base_reference({"base_model_name_or_path": "a\0b"}, tmp_path) == "a\0b"
    named = {"base_model_name_or_path": "org/name", "revision": "v1"}
    assert base_reference(named, tmp_path) == "org/name@v1"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert base_reference(named, tmp_path) == str(tmp_path / "org" / "name")
    assert (
        base_reference({"base_model_name_or_path": "package:p/f.gguf", "revision": "v1"}, tmp_path)
        == "package:p/f.gguf"
    )
