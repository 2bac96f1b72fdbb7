"""Masks over adapters of every kind: inside PEFT's own layers, and over the weights of the model that PEFT merges."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

import resafe
from resafe.checkpoints import inject_adapter, load_model, open_checkpoint, save_model
from resafe.deltas import MergedVector, check_together, merged_model, task_vector, task_vectors
from resafe.deltas.lora import factor_pairs, is_plain
from resafe.engine.sources import AdapterSource
from resafe.errors import InputError
from resafe.evals.shared_base import SharedBase
from resafe.fusion import Fusion
from resafe.masks import Mask, MaskSettings, install_masks
from resafe.masks.modules import MaskedLora
from resafe.realign import Problem, write_realigned
from resafe.realign.safety import agreements, safety_vector
from tests.tiny import TOKENS, Source, logits

ATTENTION = ["q_proj", "v_proj"]


def lora(**settings):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | settings))


def of(kind, **settings):
    return getattr(peft, f"{kind}Config")(**({"target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | settings))


BLOCKS = peft.tuners.lora.config.BdLoraConfig(target_modules_bd_b=ATTENTION, nblocks=2)
OWN = {
    "DoRA": ("llama", lora(use_dora=True)),
    "DoRA of Conv1D": ("gpt2", lora(use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True)),
    "DoRA of the embedding": ("llama", lora(use_dora=True, target_modules=["q_proj", "embed_tokens"])),
    "bias of B": ("gpt2", lora(lora_bias=True, target_modules=["c_attn"], fan_in_fan_out=True)),
    "all biases": ("gpt2", lora(bias="all", target_modules=["c_attn"], fan_in_fan_out=True)),
    "head saved": ("llama", lora(modules_to_save=["lm_head"])),
    "tied head saved": ("tied", lora(modules_to_save=["lm_head"])),
    "embedding": ("llama", lora(target_modules=["q_proj", "embed_tokens"])),
    "tied embedding": ("tied", lora(target_modules=["q_proj", "embed_tokens"])),
    "both tied": ("tied", lora(target_modules=["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=True)),
    "tokens": ("tied", lora(trainable_token_indices=[5, 6])),
    "tokens alone": ("tied", peft.TrainableTokensConfig(token_indices=[5, 6], task_type="CAUSAL_LM")),
    "quantised pools": ("llama", lora(use_qalora=True, qalora_group_size=4)),
    "blocks": ("llama", lora(use_bdlora=BLOCKS)),
    "experts": ("mixtral", lora(target_modules="all-linear")),
    "experts' parameters": ("mixtral", lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "AdaLoRA": ("llama", of("AdaLora", total_step=10, init_r=4)),
    "LoHa": ("llama", of("LoHa", r=4)),
    "LoKr": ("llama", of("LoKr", r=4)),
    "VeRA": ("llama", of("Vera", r=4)),
    "FourierFT": ("llama", of("FourierFT", n_frequency=40)),
    "OFT": ("llama", of("OFT", oft_block_size=4)),
}
"""Adapters that start at one that changes nothing, which is known of each tensor: masked in their own tensors."""

MERGED = {
    "PiSSA": ("llama", lora(init_lora_weights="pissa")),
    "OLoRA": ("tied", lora(init_lora_weights="olora")),
    "KaSA": ("llama", lora(kasa_config=peft.KasaConfig())),
    "IA3": ("llama", of("IA3", feedforward_modules=["v_proj"])),
    "HRA": ("llama", of("HRA")),
    "norms alone": ("llama", peft.LNTuningConfig(task_type="CAUSAL_LM")),
}
"""Those of which it is not: masked in the weights."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models by name, saved."""
    root, found = tmp_path_factory.mktemp("bases"), {}
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    of_gpt2 = {"vocab_size": 97, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=3)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**of_gpt2)),
    }
    for number, (name, make) in enumerate(made.items()):
        torch.manual_seed(number)
        make().save_pretrained(root / name)
        found[name] = open_checkpoint(root / name, cache=root / "cache")
    return found


def disturbed(model, path, size=0.2):
    """PEFT's model with everything that trains moved, saved; the checkpoint's path."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(path)
    return model.eval()


def tuned_on(base, path, config, seed=7):
    """An adapter on a base, and its model as PEFT computes it, unmerged."""
    torch.manual_seed(seed)
    model = disturbed(get_peft_model(load_model(base), config), path)
    return open_checkpoint(f"{base.path}+{path}", cache=base.cache), model


def close(found, wanted, bound=1e-4):
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)


def masked(base, vectors, **more):
    """A base model with masks in it, and their logits."""
    model = load_model(base)
    fusion = more.pop("fusion", Fusion("task_arithmetic"))
    plan = MaskSettings(**({"sampling": "direct", "initial": 1.0} | more))
    return model, install_masks(model, vectors, plan, seed=0, combine=fusion.combine, linear=fusion.linear)


def check_reads_as(base, vector, tuned, aligned):
    """Ones are the tuned model and zeros the aligned one, and every mask has a gradient."""
    model, values = masked(base, [vector])
    for reading, wanted in (("ones", tuned), ("zeros", aligned)):
        with values.reading(reading):
            close(logits(model), wanted)
    assert float((tuned - aligned).abs().max()) > 0.05
    model(input_ids=TOKENS).logits.square().sum().backward()
    assert values.values and all(float(value.grad.abs().sum()) > 0 for value in values.values.values())
    return model, values


def check_written(base, vector, tuned, path, model, values):
    """What is written with a mask is the model that the mask was in."""
    torch.manual_seed(11)
    masks = {key: (255 * torch.rand_like(value)).round() / 255 for key, value in values.values.items()}  # as files hold
    with torch.no_grad():
        for key, value in values.values.items():
            value.copy_(masks[key])
    mask = Mask.of(masks, MaskSettings(), {}, {key: value.numel() for key, value in masks.items()})
    from resafe.realign.mask_family import mask_family

    out = write_realigned(path, [vector], mask_family(Problem([vector]), mask, (1.0,)).at(1.0), tuned, "")
    adapter = (out / "adapter_config.json").is_file()
    found = (
        PeftModel.from_pretrained(load_model(base), str(out)).eval() if adapter else load_model(open_checkpoint(out))
    )
    close(logits(found), logits(model))
    return adapter


@pytest.mark.parametrize("kind", OWN)
def test_in_its_own_tensors(bases, tmp_path, kind):
    base, config = bases[OWN[kind][0]], OWN[kind][1]
    tuned, wanted = tuned_on(base, tmp_path / "tuned", config)
    vector = task_vector(tuned, base)
    assert vector.adapter is tuned and vector.factor_modules() is None and not is_plain(tuned)
    model, values = check_reads_as(base, vector, logits(wanted), logits(load_model(base)))
    assert not any(isinstance(module, MaskedLora) for module in model.modules())
    assert set(values.values) == {name for name in vector.names if bool(vector.delta(name).any())}
    assert check_written(base, vector, tuned, tmp_path / "out", model, values)


@pytest.mark.parametrize("kind", ["DoRA", "both tied", "experts", "all biases"])
def test_gradients_are_those_of_peft_times_the_task_vector(bases, tmp_path, kind):
    """∂loss/∂m = τ ∂loss/∂θ at m = 1, with the gradients of PEFT's own parameters."""
    base, config = bases[OWN[kind][0]], OWN[kind][1]
    tuned, _ = tuned_on(base, tmp_path / "tuned", config)
    vector = task_vector(tuned, base)
    model, values = masked(base, [vector])
    plain = load_model(base)
    places = inject_adapter(plain, tuned)
    plain.requires_grad_(True)
    for each in (model, plain):
        each(input_ids=TOKENS).logits.square().sum().backward()
    for name, value in values.values.items():
        delta = vector.delta(name)
        places_of = {plain.get_submodule(layer).get_parameter(parameter) for layer, parameter in places[name]}
        gradient = sum(one.grad if one.shape == delta.shape else one.grad.T for one in places_of)
        torch.testing.assert_close(value.grad, gradient * delta, rtol=2e-3, atol=2e-3 * float(value.grad.abs().max()))


MOST = {kind: case for kind, case in {**OWN, **MERGED}.items() if case[0] != "tied" or kind in ("tokens", "OLoRA")}


FEW = ("DoRA", "head saved", "tokens", "experts", "AdaLoRA", "PiSSA", "HRA")


@pytest.mark.parametrize("kind", [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in MOST])
def test_in_the_weights_that_peft_merges(bases, tmp_path, kind):
    base, config = bases[MOST[kind][0]], MOST[kind][1]
    tuned, wanted = tuned_on(base, tmp_path / "tuned", config)
    vector = task_vector(tuned, base, "weights")
    assert isinstance(vector, MergedVector) and vector.adapter is None
    model, values = check_reads_as(base, vector, logits(wanted), logits(load_model(base)))
    assert set(values.values) <= set(base.tensors)
    assert not check_written(base, vector, tuned, tmp_path / "out", model, values)


@pytest.mark.parametrize("kind", MERGED)
def test_without_saying_so_where_its_start_is_not_known(bases, tmp_path, kind):
    base, config = bases[MERGED[kind][0]], MERGED[kind][1]
    tuned, _ = tuned_on(base, tmp_path / "tuned", config)
    assert isinstance(task_vector(tuned, base), MergedVector)
    with pytest.raises(InputError) as error:
        task_vector(tuned, base, "factors")
    assert "space: weights" in error.value.hint


@pytest.mark.parametrize(
    "config", [lora(use_dora=True), lora(init_lora_weights="pissa"), lora(modules_to_save=["norm"])]
)
def test_one_that_continues_an_aligned_adapter(bases, tmp_path, config):
    """The aligned model is the aligned adapter's; where the start rewrote the base, PEFT does so again."""
    base = bases["llama"]
    safe, safe_model = tuned_on(base, tmp_path / "safe", config)
    torch.manual_seed(5)
    model = PeftModel.from_pretrained(load_model(base), str(safe.path), is_trainable=True)
    model = disturbed(model, tmp_path / "tuned")
    tuned = open_checkpoint(f"{base.path}+{tmp_path / 'tuned'}", cache=base.cache)
    for space in ("auto", "weights"):
        vector = task_vector(tuned, safe, space)
        found, values = check_reads_as(base, vector, logits(model), logits(safe_model))
        adapter = check_written(base, vector, tuned, tmp_path / f"out-{space}", found, values)
        assert adapter == (space == "auto") == (vector.adapter is not None)


@pytest.mark.parametrize("space", ["auto", "weights"])
def test_several_are_fused_inside(bases, tmp_path, space):
    """TIES of two DoRA adapters at masks of ones is TIES of their tensors, or of their merged models' weights."""
    base, fusion = bases["llama"], Fusion("ties", {"keep": 0.5})
    tuned = [tuned_on(base, tmp_path / f"tuned{n}", lora(use_dora=True), seed=n)[0] for n in (1, 2)]
    vectors = [task_vector(one, base, space) for one in tuned]
    deltas = {name: [vector.delta(name) for vector in vectors] for name in vectors[0].names}
    statistics = fusion.statistics(vectors[0].names, deltas.__getitem__)
    model = load_model(base)

    def combine(name, given):
        return fusion.combine(name, given, statistics)

    values = install_masks(model, vectors, MaskSettings(per_task=True), seed=0, combine=combine, linear=False)
    realigned = Problem(vectors, fusion).masked(lambda name: 1.0)
    out = write_realigned(tmp_path / "out", vectors, realigned, tuned[0], "")
    found = load_model(open_checkpoint(f"{base.path}+{out}" if space == "auto" else out, cache=base.cache))
    with values.reading("ones"):
        close(logits(model), logits(found))
    assert len(values.values) == 2 * sum(bool(deltas[name][0].any()) for name in deltas)


def test_the_merged_model_is_made_once(bases, tmp_path, monkeypatch):
    base = bases["llama"]
    tuned, wanted = tuned_on(base, tmp_path / "tuned", of("HRA"), seed=12)
    found = merged_model(tuned)
    close(logits(load_model(found)), logits(wanted))
    assert found.path.parent == base.cache / "merged"

    def refused(*_, **__):
        raise AssertionError("merged again")

    monkeypatch.setattr("resafe.deltas.merged.load_model", refused)
    assert merged_model(open_checkpoint(tuned.reference, cache=base.cache)).digest == found.digest


@pytest.mark.parametrize("kind", ["both tied", "tokens", "tied embedding", "tied head saved"])
def test_a_merged_model_is_saved_as_tied_as_it_is(bases, tmp_path, kind):
    tuned, wanted = tuned_on(bases["tied"], tmp_path / "tuned", OWN[kind][1])
    saved = open_checkpoint(save_model(tmp_path / "out", load_model(tuned), tuned, ""))
    close(logits(load_model(saved)), logits(wanted))
    assert ("lm_head.weight" in saved.tensors) == (kind in ("tied embedding", "tied head saved"))


@pytest.mark.parametrize("kind", ["tied head saved", "tied embedding"])
def test_a_tied_model_has_no_place_for_two_vocabularies(bases, tmp_path, kind):
    base, config = bases["tied"], OWN[kind][1]
    tuned, wanted = tuned_on(base, tmp_path / "tuned", config)
    close(logits(load_model(tuned)), logits(wanted))  # in memory there is: merging one leaves the other as it is
    with pytest.raises(InputError, match=r"lm_head.weight is not in") as error:
        _ = task_vector(tuned, base, "weights").names
    assert "space: factors" in error.value.hint


REFUSED = {
    "an activated LoRA": (lora(alora_invocation_tokens=[3, 4]), "is an activated LoRA"),
    "repeated layers": (lora(layer_replication=[[0, 2], [0, 2]]), "repeats layers of its base"),
    "prompt tuning": (
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "puts tokens before the prompt",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_mask_can_be_over(bases, tmp_path, kind):
    base, (config, words) = bases["llama"], REFUSED[kind]
    tuned, _ = tuned_on(base, tmp_path / "tuned", config)
    for space in ("auto", "weights"):
        with pytest.raises(InputError, match=words):
            _ = task_vector(tuned, base, space).names
    if kind == "prompt tuning":
        with pytest.raises(InputError, match=words):
            SharedBase(base, dtype="float32").model(tuned)


def test_repeated_layers_are_merged_apart(bases, tmp_path):
    """A layer and its repetition have one weight and two adapters."""
    tuned, wanted = tuned_on(bases["llama"], tmp_path / "tuned", lora(layer_replication=[[0, 2], [0, 2]]))
    close(logits(load_model(tuned)), logits(wanted))


@pytest.mark.parametrize("kind", ["all biases", "tied embedding", "both tied", "tokens", "OLoRA", "repeated layers"])
def test_on_a_base_that_stays_loaded(bases, tmp_path, kind):
    """Evaluations merge one adapter after another into one base: tied weights part, biases are loaded in place."""
    base, config = {**OWN, **MERGED, "repeated layers": ("llama", REFUSED["repeated layers"][0])}[kind]
    tuned, wanted = tuned_on(bases[base], tmp_path / "tuned", config)
    shared = SharedBase(bases[base], dtype="float32")
    before = logits(shared.model(bases[base]))
    close(logits(shared.model(tuned)), logits(wanted))
    assert torch.equal(logits(shared.model(bases[base])), before)
    plain = shared.model(bases[base])
    assert vars(plain.config) == vars(load_model(bases[base]).config)
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == (base != "llama")


UNLIKE = {
    "scale": (of("LoHa", r=4, alpha=8), of("LoHa", r=4, alpha=16), "alpha"),
    "places": (of("FourierFT", n_frequency=40), of("FourierFT", n_frequency=40, random_loc_seed=2), "random_loc_seed"),
    "projections": (of("Vera", r=4), of("Vera", r=4, projection_prng_key=1), "projection_prng_key"),
    "tokens": (lora(trainable_token_indices=[5, 6]), lora(trainable_token_indices=[7, 6]), "trainable_token_indices"),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_tensors_that_mean_something_else(bases, tmp_path, kind):
    """Of one name and shape, and yet no difference of theirs is a change, nor a sum a fusion."""
    base, (*configs, field) = bases["llama"], UNLIKE[kind]
    one, two = (tuned_on(base, tmp_path / str(place), config)[0] for place, config in enumerate(configs))
    with pytest.raises(InputError, match=f"{field} is .* in the aligned and .* in the tuned"):
        task_vector(two, one)
    with pytest.raises(InputError, match=f"they differ in {field}") as error:
        check_together(task_vectors([one, two], base))
    assert "space: weights" in error.value.hint
    check_together(task_vectors([one, two], base, "weights"))


@pytest.mark.parametrize("space", ["auto", "weights"])
def test_kinds_together(bases, tmp_path, space):
    """Plain LoRA beside an adapter that only PEFT can merge: both as their merged models' weights."""
    base = bases["llama"]
    kinds = {"plain": lora(), "PiSSA": lora(init_lora_weights="pissa")}
    tuned = [tuned_on(base, tmp_path / name, config)[0] for name, config in kinds.items()]
    problem = Problem(task_vectors(tuned, base, space), Fusion("average"))
    found, plain, ends = problem.masked(lambda name: 1.0), load_model(base).state_dict(), []
    for one in tuned:
        ends.append(load_model(one).state_dict())
    for name in problem.names:
        close(found(name), plain[name] + sum(end[name] - plain[name] for end in ends) / 2, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_with_tensors_that_are_not_loaded(bases, tmp_path, name):
    """Files on the hub hold GPT-2's attention masks, and old LLaMAs' frequencies."""
    spare = {"llama": "model.layers.0.self_attn.rotary_emb.inv_freq", "gpt2": "h.0.attn.bias"}[name]
    shutil.copytree(bases[name].path, tmp_path / "base")
    tensors = {key.removeprefix("transformer."): bases[name].read(key) for key in bases[name].tensors}
    save_file(tensors | {spare: torch.ones(2)}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base = open_checkpoint(tmp_path / "base", cache=bases[name].cache)
    targets = {"llama": {}, "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True}}[name]
    tuned, wanted = tuned_on(base, tmp_path / "tuned", lora(init_lora_weights="pissa", **targets))
    vector = task_vector(tuned, base)
    model, values = check_reads_as(base, vector, logits(wanted), logits(load_model(base)))
    assert not check_written(base, vector, tuned, tmp_path / "out", model, values)
    assert torch.equal(open_checkpoint(tmp_path / "out").read(spare), torch.ones(2))


def test_an_untied_head_that_equals_the_embedding(bases, tmp_path):
    """It stays untied when an adapter is merged: files of a model that is not tied hold both."""
    shutil.copytree(bases["llama"].path, tmp_path / "base")
    tensors = {key: bases["llama"].read(key) for key in bases["llama"].tensors}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base = open_checkpoint(tmp_path / "base", cache=bases["llama"].cache)
    tuned, wanted = tuned_on(base, tmp_path / "tuned", lora(init_lora_weights="pissa"))
    assert "lm_head.weight" in merged_model(tuned).tensors
    check_reads_as(base, task_vector(tuned, base), logits(wanted), logits(load_model(base)))


def test_who_merges_second_leaves_the_first_ones_files(bases, tmp_path, monkeypatch):
    """Another process may be reading them."""
    base = bases["llama"]
    tuned, _ = tuned_on(base, tmp_path / "tuned", of("HRA"), seed=13)

    def slower(adapter, **more):
        model = load_model(adapter, **more)
        monkeypatch.setattr("resafe.deltas.merged.load_model", load_model)
        states.append(merged_model(tuned).files[0].stat().st_ino)  # the other process
        return model

    states = []
    monkeypatch.setattr("resafe.deltas.merged.load_model", slower)
    assert merged_model(tuned).files[0].stat().st_ino == states[0]


@pytest.mark.parametrize("kind", ["bias of B", "blocks", "DoRA"])
def test_ranks_that_are_no_factors(bases, tmp_path, kind):
    base, config = bases[OWN[kind][0]], OWN[kind][1]
    tuned, _ = tuned_on(base, tmp_path / "tuned", config)
    with pytest.raises(InputError, match="granularity 'rank'"):
        masked(base, [task_vector(tuned, base)], granularity="rank")


NOT_FUSED = ["DoRA of Conv1D", "DoRA of the embedding", "tied head saved", "embedding", "tokens", "blocks", "LoHa"]


@pytest.mark.parametrize("kind", [*NOT_FUSED, "repeated layers"])
def test_what_fusions_do_not_form(bases, tmp_path, kind):
    kinds = {**OWN, **MERGED, "repeated layers": ("llama", lora(layer_replication=[[0, 1], [0, 1]]))}
    base, config = bases[kinds[kind][0]], kinds[kind][1]
    tuned, _ = tuned_on(base, tmp_path / "tuned", config)
    with pytest.raises(InputError, match="cannot be fused|would be both"):
        AdapterSource(tuned, base, {})


@pytest.mark.parametrize("kind", ["DoRA", "experts", "PiSSA"])
def test_what_reads_factors_alone_refuses_it(bases, tmp_path, kind):
    base, config = bases[{**OWN, **MERGED}[kind][0]], {**OWN, **MERGED}[kind][1]
    tuned, _ = tuned_on(base, tmp_path / "tuned", config)
    with pytest.raises(InputError) as error:
        factor_pairs(tuned)
    assert "space: weights" in error.value.hint
    if kind != "DoRA":  # whose weights fusions form from the files
        with pytest.raises(InputError, match="all experts of a layer|was started by"):
            _ = AdapterSource(tuned, base, {})._parts


def test_against_the_safety_vector(bases, tmp_path):
    """In the weights v is the difference of merged models; over an adapter's own tensors it is not known."""
    base = bases["llama"]
    safe, _ = tuned_on(base, tmp_path / "safe", lora(use_dora=True))
    model = PeftModel.from_pretrained(load_model(base), str(safe.path), is_trainable=True)
    disturbed(model, tmp_path / "tuned")
    tuned = open_checkpoint(f"{base.path}+{tmp_path / 'tuned'}", cache=base.cache)
    old, new, plain = (load_model(one).state_dict() for one in (safe, tuned, base))
    for space in ("weights", "auto"):
        problem = Problem([task_vector(tuned, safe, space)])
        _, values = masked(base, problem.vectors)
        if space == "auto":
            with pytest.raises(InputError, match="more than LoRA's factors"):
                agreements(values, problem, safety_vector(problem, None, None))
            continue
        found = agreements(values, problem, safety_vector(problem, None, None))
        for name, product in found.items():
            close(product, (new[name] - old[name]) * (old[name] - plain[name]), 1e-5)


@pytest.mark.parametrize("kind", ["DoRA", "PiSSA"])
def test_trained_and_applied(lab, tmp_path, kind):
    """As a user has it: train a mask on such an adapter, apply it, and get the form that the adapter had."""
    base = lab.open("base")
    tuned, _ = tuned_on(base, tmp_path / "tuned", {**OWN, **MERGED}[kind][1])
    vector = task_vector(tuned, base)
    problem = Problem([vector], source=Source(lab))
    assert problem.names == vector.names
    settings = {"preset": "labels", "steps": 2, "batch_size": 4}
    resafe.train_mask(base, [tuned], out=tmp_path / "mask", settings=settings, device="cpu")
    out = resafe.apply_mask(tmp_path / "mask", base, [tuned], out=tmp_path / "out")
    assert (out / "adapter_config.json").is_file() == (kind == "DoRA")
    found = open_checkpoint(f"{base.path}+{out}" if kind == "DoRA" else out, cache=base.cache)
    ends = [logits(load_model(one)) for one in (base, tuned)]
    moved = [float((logits(load_model(found)) - end).abs().max()) for end in ends]
    assert min(moved) > 1e-3 and max(moved) < float((ends[0] - ends[1]).abs().max()) * 1.5


def test_what_peft_cannot_merge(bases, tmp_path):
    """A bias of B on a layer that has none: masked in its own tensors, and no weights of such a model."""
    base = bases["llama"]
    tuned, wanted = tuned_on(base, tmp_path / "tuned", lora(lora_bias=True))
    with pytest.raises(InputError, match="PEFT cannot merge it into its base .*no bias") as error:
        _ = task_vector(tuned, base, "weights").names
    assert "space: factors" in error.value.hint
    check_reads_as(base, task_vector(tuned, base, "factors"), logits(wanted), logits(load_model(base)))
