"""Adapters of other kinds against PEFT's own models: Conv1D, bases with bare names, DoRA, modules trained whole."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from resafe.checkpoints import load_model, open_checkpoint
from resafe.deltas import MergedVector, task_vector
from resafe.deltas.lora import factor_modules
from resafe.engine.sources import AdapterSource
from resafe.errors import InputError
from resafe.evals.shared_base import SharedBase
from resafe.masks import MaskSettings, install_masks
from resafe.realign import REALIGN, Problem, write_realigned
from resafe.realign.safety import agreements, safety_vector
from tests.tiny import logits

QUERY = "model.layers.0.self_attn.q_proj.weight"
SIZES = {"vocab_size": 97, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}


def saved(path, kind="GPT2", prefix=""):
    """A model whose files leave out a prefix, and the directory it is in."""
    torch.manual_seed(0)
    if kind == "GPT2":
        config = transformers.GPT2Config(n_positions=64, n_embd=16, **SIZES)
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=16, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    file = path / "model.safetensors"
    save_file({k.removeprefix(prefix): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    return open_checkpoint(path, cache=path.parent / "cache")


def tuned_on(base, path, targets, start=None, size=0.1, save=None, **settings):
    """An adapter on a base, or one that continues another, with everything that trains disturbed."""
    plain = load_model(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(1 if start is None else 2)
    model = (
        get_peft_model(plain, config)
        if start is None
        else PeftModel.from_pretrained(plain, str(start.path), is_trainable=True)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(path, **(save or {}))
    return open_checkpoint(path, cache=path.parent / "cache")


def at(vector, strength):
    return REALIGN.get("interpolation").function(Problem([vector])).at(strength)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


KINDS = [
    ("GPT2", "", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),  # (in, out), square and not
    ("GPT2", "transformer.", ["c_attn", "attn.c_proj"], {"fan_in_fan_out": True}),
    ("BLOOM", "transformer.", ["query_key_value"], {}),  # as on the Hub: of the model without its head
]


@pytest.mark.parametrize(("kind", "prefix", "targets", "settings"), KINDS)
def test_products_are_written_as_peft_merges_them(tmp_path, kind, prefix, targets, settings):
    base = saved(tmp_path / "base", kind, prefix)
    safe = tuned_on(base, tmp_path / "safe", targets, **settings)
    tuned = tuned_on(base, tmp_path / "tuned", targets, start=safe)
    for aligned in (base, safe):
        vector = task_vector(tuned, aligned, "weights")
        assert set(vector.names) <= set(base.tensors)
        new, old = (load_model(checkpoint) for checkpoint in (tuned, aligned))
        for name in vector.names:
            merged = [model.state_dict()[prefix + name] for model in (new, old)]
            assert vector.shape(name) == tuple(vector.delta(name).shape)
            close(vector.aligned(name), merged[1])
            close(vector.delta(name), merged[0] - merged[1])
        for strength, model in ((0.0, new), (1.0, old)):
            out = write_realigned(tmp_path / f"out{strength}", [vector], at(vector, strength), tuned, "")
            close(logits(load_model(open_checkpoint(out, cache=tmp_path / "cache"))), logits(model))
        assert float((logits(new) - logits(old)).abs().max()) > 0.1


@pytest.mark.parametrize(("kind", "prefix", "targets", "settings"), KINDS)
@pytest.mark.parametrize("space", ["factors", "weights"])
def test_masks_over_them(tmp_path, kind, prefix, targets, settings, space):
    base = saved(tmp_path / "base", kind, prefix)
    safe = tuned_on(base, tmp_path / "safe", targets, **settings)
    tuned = tuned_on(base, tmp_path / "tuned", targets, start=safe)
    vector = task_vector(tuned, safe, space)
    model = load_model(base)
    values = install_masks(model, [vector], MaskSettings(), seed=0, combine=lambda n, d: d[0], linear=True)
    assert set(values.values) == set(vector.names)
    for reading, checkpoint in (("ones", tuned), ("zeros", safe)):
        with values.reading(reading):
            close(logits(model), logits(load_model(checkpoint)))
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    assert all(float(value.grad.abs().sum()) > 0 for value in values.values.values())


@pytest.mark.parametrize(("kind", "prefix", "targets", "settings"), KINDS)
def test_agreement_with_the_safety_vector_over_their_factors(tmp_path, kind, prefix, targets, settings):
    """τ · ∂⟨W, V⟩ by autograd through s B A, in the orientation that the weight is stored in."""
    base = saved(tmp_path / "base", kind, prefix)
    safe = tuned_on(base, tmp_path / "safe", targets, **settings)
    vector = task_vector(tuned_on(base, tmp_path / "tuned", targets, start=safe), safe)
    of = Problem([vector])
    plan = MaskSettings(granularity="tensor")
    values = install_masks(load_model(base), [vector], plan, seed=0, combine=lambda n, d: d[0], linear=True)
    found = agreements(values, of, safety_vector(of, None, None))
    old, new = load_model(base).state_dict(), load_model(safe).state_dict()
    for module, (a, b, scale) in vector.factor_modules().items():
        v = new[f"{module}.weight"] - old[f"{module}.weight"]
        factors = [(vector.aligned(n) + vector.delta(n)).requires_grad_() for n in (a, b)]
        change = scale * factors[1] @ factors[0]
        ((change.T if settings else change) * v).sum().backward()
        for name, factor in zip((a, b), factors, strict=True):
            close(found[name].reshape(()), (factor.grad * vector.delta(name)).sum())


FRESH = {
    "dora": ("tied", {"use_dora": True, "targets": ["q_proj", "down_proj"]}, "magnitude"),
    "dora of GPT-2": ("GPT2", {"use_dora": True, "targets": ["c_attn"], "fan_in_fan_out": True}, "magnitude"),
    "head": ("base", {"modules_to_save": ["lm_head"], "targets": ["q_proj"]}, "lm_head.weight"),
    "embedding": ("base", {"targets": ["q_proj", "embed_tokens"]}, "base_layer.weight"),
    "biases": ("GPT2", {"bias": "all", "targets": ["c_attn"], "fan_in_fan_out": True}, ".bias"),
}


@pytest.mark.parametrize("kind", FRESH)
def test_a_fresh_adapter_starts_at_one_that_changes_nothing(lab, tmp_path, kind):
    of, settings, odd = FRESH[kind]
    base = saved(tmp_path / "base") if of == "GPT2" else lab.open(of)
    tuned = tuned_on(
        base, tmp_path / "tuned", settings["targets"], **{k: v for k, v in settings.items() if k != "targets"}
    )
    vector = task_vector(tuned, base)
    names = [name for name in vector.names if odd in name]
    assert names and all(bool(vector.aligned(name).any()) for name in names)
    for name in names:
        close(vector.aligned(name) + vector.delta(name), tuned.read(name))
    for strength, model in ((0.0, load_model(tuned)), (1.0, load_model(base))):
        out = write_realigned(tmp_path / f"out{strength}", [vector], at(vector, strength), tuned, "")
        found = PeftModel.from_pretrained(load_model(base), str(out)).eval()
        close(logits(found), logits(model))
    assert float((logits(load_model(tuned)) - logits(load_model(base))).abs().max()) > 0.05


def test_what_a_tensor_started_from_is_not_known(lab, tmp_path):
    """Of an adapter's tensors it may not be; of the weights that it is merged into it always is."""
    base = lab.open("base")
    model = peft.get_peft_model(load_model(base), peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    model.save_pretrained(tmp_path / "tuned")
    tuned = open_checkpoint(f"{lab.root / 'base'}+{tmp_path / 'tuned'}", cache=tmp_path / "cache")
    with pytest.raises(InputError, match=r"not known:\n  .*ia3_l") as error:
        task_vector(tuned, base, "factors")
    assert "space: weights" in error.value.hint
    for vector in (task_vector(tuned, base), task_vector(tuned, base, "weights")):  # as the hint has it
        assert isinstance(vector, MergedVector) and set(vector.names) == set(base.tensors)


def test_trained_tokens_are_rows_of_the_embedding(lab, tmp_path):
    base = lab.open("base")
    tuned = tuned_on(base, tmp_path / "tuned", ["q_proj"], trainable_token_indices=[5, 6])
    vector, weights = task_vector(tuned, base), task_vector(tuned, base, "weights")
    (name,) = (name for name in vector.names if "trainable_tokens" in name)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(vector.aligned(name), base.read(embedding)[[5, 6]])
    moved = weights.delta(embedding).abs().sum(1).nonzero().flatten().tolist()
    assert moved == [5, 6]
    close(weights.delta(embedding)[[5, 6]], vector.delta(name))


def test_an_output_layer_that_the_base_does_not_store(lab, tmp_path):
    base = lab.open("tied")
    tuned = tuned_on(base, tmp_path / "tuned", ["q_proj", "lm_head"], save={"save_embedding_layers": False})
    with pytest.raises(InputError, match=r"changes 'lm_head.weight', for which .* stores no tensor"):
        _ = task_vector(tuned, base, "weights").names


def test_nothing_is_left_unwritten_in_silence(lab, tmp_path):
    vector = task_vector(lab.open("full_all"), lab.open("base"))
    with pytest.raises(InputError, match=r"does not have what was realigned:\n  lm_head.weight"):
        write_realigned(tmp_path / "out", [vector], at(vector, 0.5), lab.open("tied"), "")


@pytest.mark.parametrize("kind", ["AdaLora", "LoHa", "LoKr", "Vera", "FourierFT", "OFT"])
def test_kinds_whose_tensors_are_zero_where_they_change_nothing(lab, tmp_path, kind):
    base, settings = lab.open("base"), {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    settings |= {"AdaLora": {"total_step": 10, "init_r": 4}, "FourierFT": {"n_frequency": 40}}.get(kind, {})
    settings |= {"OFT": {"oft_block_size": 4}, "FourierFT": {}, "AdaLora": {}}.get(kind, {"r": 4})
    model = peft.get_peft_model(load_model(base), getattr(peft, f"{kind}Config")(**settings))
    torch.manual_seed(3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    tuned = open_checkpoint(f"{lab.root / 'base'}+{tmp_path / 'tuned'}")
    vector = task_vector(tuned, base)
    constants = {"AdaLora": ["ranknum"], "Vera": ["vera_A", "vera_B"]}.get(kind, [])
    for name in vector.names:
        same = name.rpartition(".")[2] in constants  # which do not learn
        assert torch.equal(vector.aligned(name), tuned.read(name) if same else torch.zeros(vector.shape(name)))
    assert any(bool(vector.delta(name).any()) for name in vector.names)
    for strength, wanted in ((0.0, model.eval()), (1.0, load_model(base))):
        out = write_realigned(tmp_path / f"out{strength}", [vector], at(vector, strength), tuned, "")
        close(logits(PeftModel.from_pretrained(load_model(base), str(out)).eval()), logits(wanted))


def rewritten(lab, path, start, trained=0.1):
    """An adapter whose start takes its factors out of the base, its model's logits, and what it was at the start."""
    torch.manual_seed(4)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=start)
    model = get_peft_model(lab.plain(), config).eval()
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it for a later conversion
    model.save_pretrained(path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(trained * torch.randn_like(parameter))
    wanted = logits(model)
    model.save_pretrained(path / "tuned")
    model.save_pretrained(path / "plain", path_initial_model_for_weight_conversion=str(path / "start"))
    return open_checkpoint(f"{lab.root / 'base'}+{path / 'tuned'}", cache=path / "cache"), wanted


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_16"])
def test_an_adapter_whose_start_rewrote_the_base(lab, tmp_path, start):
    """PEFT rewrites the base again as it loads the adapter: its model is right, the adapter's product alone is not."""
    base = lab.open("base")
    tuned, wanted = rewritten(lab, tmp_path, start)
    if "niter" not in start:  # which draws at random, and is another at every load
        close(logits(load_model(tuned)), wanted)
        shared = SharedBase(base, dtype="float32")
        close(logits(shared.model(tuned)), wanted)
        assert torch.equal(logits(shared.model(base)), logits(lab.plain()))  # not the rewritten one
    for refused in (
        lambda: task_vector(tuned, base, "factors"),
        lambda: factor_modules(tuned),
        lambda: AdapterSource(tuned, base, {}),
    ):
        with pytest.raises(InputError, match=f"started by init_lora_weights '{start}'") as error:
            refused()
        assert "space: weights" in error.value.hint
        assert "merge_and_unload" in error.value.hint and "path_initial_model" in error.value.hint
    weights = task_vector(tuned, base)
    assert isinstance(weights, MergedVector)
    if "niter" not in start:
        merged = load_model(tuned).state_dict()
        close(weights.aligned(QUERY) + weights.delta(QUERY), merged[QUERY])
    plain = open_checkpoint(f"{lab.root / 'base'}+{tmp_path / 'plain'}", cache=tmp_path / "cache")  # as the hint has it
    model = load_model(base)
    values = install_masks(
        model, [task_vector(plain, base)], MaskSettings(), seed=0, combine=lambda n, d: d[0], linear=True
    )
    with values.reading("ones"):
        close(logits(model), wanted)


@pytest.mark.parametrize("start", ["lora_ga", "corda"])
def test_an_adapter_whose_start_cannot_be_made_again(lab, tmp_path, start):
    """PEFT would put a LoRA-GA adapter on the base as it is, and say nothing."""
    tuned_on(lab.open("base"), tmp_path / "tuned", ["q_proj"])
    config = tmp_path / "tuned" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": start}))
    tuned = open_checkpoint(f"{lab.root / 'base'}+{tmp_path / 'tuned'}", cache=tmp_path / "cache")
    for load in (load_model, SharedBase(lab.open("base")).model):
        with pytest.raises(InputError, match=f"'{start}', which rewrites the base from data"):
            load(tuned)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica", False])
def test_starts_that_leave_the_base_as_it_is(lab, tmp_path, start):
    base = lab.open("base")
    tuned = tuned_on(base, tmp_path / "tuned", ["q_proj"], init_lora_weights=start)
    model = load_model(base)
    values = install_masks(
        model, [task_vector(tuned, base)], MaskSettings(), seed=0, combine=lambda n, d: d[0], linear=True
    )
    for reading, other in (("ones", tuned), ("zeros", base)):
        with values.reading(reading):
            close(logits(model), logits(load_model(other)))
