"""Writing and loading: what goes out comes back, by resafe and by transformers and PEFT."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from resafe.checkpoints import load_model, load_tokenizer, open_checkpoint, save_adapter, save_model
from resafe.errors import InputError
from tests.checkpoints.conftest import TEMPLATE, TOKENS, make_tokenizer


def tensors_of(checkpoint):
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(first, second):
    one, two = tensors_of(first), tensors_of(second)
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_model_round_trip_single_and_sharded(made, tmp_path):
    like = open_checkpoint(made / "untied")
    for name, size, files in (
        ("one", "5GB", 1),
        ("many", 12_000, len(like.files)),
        ("text", "0.012MB", len(like.files)),
    ):
        assert save_model(tmp_path / name, tensors_of(like), like, "# card\n", size) == tmp_path / name
        written = open_checkpoint(tmp_path / name)
        assert len(written.files) == files
        same(written, like)
        assert (tmp_path / name / "README.md").read_text() == "# card\n"
        assert load_tokenizer(written).chat_template == TEMPLATE
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"] == 2
        with torch.no_grad():
            assert torch.equal(load_model(written)(TOKENS).logits, load_model(like)(TOKENS).logits)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == like.nbytes


def test_merged_model_equals_peft(made, tmp_path):
    adapter = open_checkpoint(made / "adapter")
    expected = torch.load(made / "adapter_logits.pt")
    merged = load_model(adapter)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not merged.training
    save_model(tmp_path / "merged", merged, adapter, "card")
    written = open_checkpoint(tmp_path / "merged")
    assert "lm_head.weight" not in written.tensors
    a, b = (adapter.read(f"base_model.model.model.layers.1.mlp.down_proj.lora_{part}.weight") for part in "AB")
    by_hand = adapter.base.read("model.layers.1.mlp.down_proj.weight") + 8 / 4 * b @ a  # lora_alpha / r = 8 / 4
    torch.testing.assert_close(written.read("model.layers.1.mlp.down_proj.weight"), by_hand)
    assert load_tokenizer(written).eos_token == "<|im_end|>"
    with torch.no_grad():
        torch.testing.assert_close(load_model(written)(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
        wrapped = load_model(adapter, merge=False)
        assert torch.equal(wrapped(TOKENS).logits, expected)
    with pytest.raises(InputError, match="still carries an adapter"):
        save_model(tmp_path / "no", wrapped, adapter, "card")
    assert not (tmp_path / "no").exists()


def test_load_dtype(made):
    model = load_model(open_checkpoint(made / "adapter"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tied_and_shared_tensors_are_stored_once(made, tmp_path):
    like = open_checkpoint(made / "base")
    tensors = tensors_of(like)
    tied = {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}  # the other name comes first
    save_model(tmp_path / "out", tied, like, "card")
    same(open_checkpoint(tmp_path / "out"), like)
    # Two different views of one memory are both stored.
    joined = torch.cat([tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"] + 1])
    views = {**tensors, "model.norm.weight": joined[:32], "model.layers.0.input_layernorm.weight": joined[32:]}
    save_model(tmp_path / "views", views, like, "card")
    found = load_file(tmp_path / "views" / "model.safetensors")
    assert found["model.norm.weight"].tolist() == [1.0] * 32
    assert found["model.layers.0.input_layernorm.weight"].tolist() == [2.0] * 32


def test_dtype_in_the_configuration_follows_the_tensors(made, tmp_path):
    like = open_checkpoint(made / "base")
    save_model(tmp_path / "half", {name: t.bfloat16() for name, t in tensors_of(like).items()}, like, "card")
    written = open_checkpoint(tmp_path / "half")
    assert written.config["dtype"] == "bfloat16"
    assert written.nbytes * 2 == like.nbytes


def test_refusals(made, tmp_path, monkeypatch):
    model, adapter = open_checkpoint(made / "base"), open_checkpoint(made / "adapter")
    for size in ("big", 0, -1, "0GB"):
        with pytest.raises(InputError, match="is not a size"):
            save_model(tmp_path / "x", tensors_of(model), model, "card", size)
    with pytest.raises(InputError, match="no tensors"):
        save_model(tmp_path / "x", {}, model, "card")
    with pytest.raises(InputError, match="is not an adapter"):
        save_adapter(tmp_path / "x", {}, model, "card")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="resafe did not write it"):
        save_adapter(tmp_path / "mine", tensors_of(adapter), adapter, "card")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    for write, like in ((save_model, model), (save_adapter, adapter)):
        with pytest.raises(InputError, match="the disk has"):
            write(tmp_path / "x", tensors_of(like), like, "card")
    with pytest.raises(InputError, match="the disk has"):
        save_model(tmp_path / "x", load_model(model), model, "card")
    assert not (tmp_path / "x").exists()


def test_adapter_round_trip(made, tmp_path):
    like = open_checkpoint(made / "adapter")
    halved = {name: tensor / 2 if "lora_B" in name else tensor for name, tensor in tensors_of(like).items()}
    save_adapter(tmp_path / "out", halved, like, "# adapter\n")
    written = open_checkpoint(tmp_path / "out")
    assert written.base.path == made / "base"
    assert {name: t.tolist() for name, t in tensors_of(written).items()} == {n: t.tolist() for n, t in halved.items()}
    assert (tmp_path / "out" / "README.md").read_text() == "# adapter\n"
    name = "model.layers.0.self_attn.q_proj.weight"
    full, half, base = (dict(load_model(c).named_parameters())[name] for c in (like, written, like.base))
    torch.testing.assert_close((full - base) / 2, half - base, atol=1e-6, rtol=1e-5)
    assert not (tmp_path / "out" / "tokenizer.json").exists()  # it has none of its own


def test_adapter_keeps_a_relative_base_and_its_own_tokenizer(copied, tmp_path):
    copied("base")
    adapter = copied("adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "../base"}))
    own = make_tokenizer()
    own.chat_template = "own"
    own.save_pretrained(adapter)
    like = open_checkpoint(adapter)
    assert load_tokenizer(like).chat_template == "own"
    save_adapter(tmp_path / "runs" / "a", tensors_of(like), like, "card")
    written = open_checkpoint(tmp_path / "runs" / "a")
    assert written.config["base_model_name_or_path"] == "../../base"
    assert load_tokenizer(written).chat_template == "own"
    explicit = open_checkpoint(f"{tmp_path / 'base'}+{made_elsewhere(adapter, tmp_path)}")
    save_adapter(tmp_path / "b", tensors_of(explicit), explicit, "card")
    assert open_checkpoint(tmp_path / "b").config["base_model_name_or_path"] == str(tmp_path / "base")


def made_elsewhere(adapter, tmp_path):
    """The adapter in a place from which its relative base leads nowhere."""
    return shutil.copytree(adapter, tmp_path / "far" / "away" / "adapter")


def test_adapter_rank_must_match(made, tmp_path):
    like = open_checkpoint(made / "adapter")
    cut = {name: t[:2] if "lora_A" in name else t[:, :2].contiguous() for name, t in tensors_of(like).items()}
    with pytest.raises(InputError, match=r"has rank 2, the configuration has r = 4"):
        save_adapter(tmp_path / "x", cut, like, "card")
    save_adapter(tmp_path / "x", cut, like, "card", config={"r": 2, "lora_alpha": 4})
    load_model(open_checkpoint(tmp_path / "x"))
    wrong = {name: t[:, :5].contiguous() if "lora_A" in name else t for name, t in tensors_of(like).items()}
    with pytest.raises(InputError, match="adapter of another base"):
        save_adapter(tmp_path / "y", wrong, like, "card")
    assert not (tmp_path / "y").exists()


def test_adapter_without_base(copied, tmp_path):
    adapter = copied("adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    like = open_checkpoint(adapter)
    with pytest.raises(InputError, match="names no base") as caught:
        load_model(like)
    assert caught.value.hint == f"open it as BASE+{adapter}"
    with pytest.raises(InputError, match="names no base"):
        save_model(tmp_path / "x", {}, like, "card")
    save_adapter(tmp_path / "out", tensors_of(like), like, "card")
    assert open_checkpoint(tmp_path / "out").base is None


def test_a_model_that_lacks_tensors_is_not_filled_with_noise(copied):
    path = copied("base")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"lacks tensors that its config\.json asks for: model\.layers\.2"):
        load_model(open_checkpoint(path))
    (path / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        load_model(open_checkpoint(path))


def test_a_damaged_adapter_configuration(copied):
    path = copied("adapter")
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["nothing"]}))
    with pytest.raises(InputError, match="PEFT cannot merge it into its base .*Target modules"):
        load_model(open_checkpoint(path))


def test_tokenizers(copied):
    path = copied("base")
    tokenizer = load_tokenizer(open_checkpoint(path))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")  # it had no padding token
    turns = [{"role": "user", "content": "hello there"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|im_start|>user hello there<|im_end|>"
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_tokenizer(open_checkpoint(path))


def test_loading_restores_the_progress_bars(made):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load_model(open_checkpoint(made / "base"))
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
