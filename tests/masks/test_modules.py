"""Masked models against PEFT's and transformers' own models with the same weights."""

from __future__ import annotations

import pytest
import torch

from resafe.checkpoints import load_model, open_checkpoint
from resafe.deltas import task_vector
from resafe.errors import InputError
from resafe.fusion import Fusion
from resafe.masks import Mask, MaskSettings, install_masks
from resafe.masks.modules import MaskedModule
from resafe.masks.summary import keep_rates, mean_keep
from tests.tiny import logits


def masked(lab, tuned=("tuned",), aligned="safe", fusion=None, base="base", space="auto", apart=False, **settings):
    vectors = [task_vector(lab.open(name), lab.open(aligned), space) for name in tuned]
    fusion = fusion or Fusion("task_arithmetic")
    model = lab.plain(base)

    def fitted(read):
        statistics = fusion.statistics(vectors[0].names, read)
        return lambda name, deltas: fusion.combine(name, deltas, statistics)

    values = install_masks(
        model,
        vectors,
        MaskSettings(**settings),
        seed=0,
        combine=fusion.combine,
        linear=fusion.linear,
        additive=fusion.additive,
        by_entry=fusion.weighted_sum,
        refit=fitted if fusion.rounds("model") else None,
        apart=apart,
    )
    return model, values, vectors


def with_factors(lab, tensors):
    """PEFT's model with the given adapter tensors, by the names they are saved under."""
    model = lab.adapted("safe")
    state = model.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            state[name.replace(".weight", ".default.weight")].copy_(value)
    return model


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["entry", "row", "column", "rank", "tensor", "layer"])
def test_ones_are_the_tuned_adapter_and_zeros_the_safe_one(lab, granularity):
    model, values, _ = masked(lab, granularity=granularity)
    with values.reading("ones"):
        same(logits(model), logits(lab.adapted("tuned")))
    with values.reading("zeros"):
        same(logits(model), logits(lab.adapted("safe")))
    assert not torch.allclose(logits(lab.adapted("tuned")), logits(lab.adapted("safe")), atol=0.01)


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare"])
@pytest.mark.parametrize("tuned", [("tuned", "tuned2"), ("full", "full2"), ("full_all", "full")])
def test_each_of_several_tuned_models_can_be_read_alone(lab, tuned, name, per_task):
    """Whatever F makes of both, and nothing else changes for it."""
    aligned = "safe" if tuned[0] == "tuned" else "base"
    plans = {"fusion": Fusion(name, {"keep": 0.3} if name == "ties" else {"weight": 0.4}), "per_task": per_task}
    model, values, _ = masked(lab, tuned, aligned, apart=True, **plans)
    usual, other, _ = masked(lab, tuned, aligned, **plans)
    with pytest.raises(ValueError, match="apart=True"), other.reading(0):
        pass
    alone = [logits(lab.adapted(which) if aligned == "safe" else lab.plain(which)) for which in tuned]
    for place, wanted in enumerate(alone):
        with values.reading(place):
            same(logits(model), wanted)
    for reading in ("trained", "ones", "zeros"):
        with values.reading(reading), other.reading(reading):
            same(logits(model), logits(usual))
    with values.reading("ones"):
        assert not torch.allclose(logits(model), alone[0], atol=0.01)


@pytest.mark.parametrize(
    ("tuned", "aligned", "base", "space"),
    [
        ("full", "base", "base", "auto"),
        ("full_all", "base", "base", "auto"),  # embedding, norms and head, too
        ("tied_full", "tied", "tied", "auto"),
        ("full_all", "full", "base", "auto"),  # neither is the model that the masks are put into
        ("full", "full2", "full_all", "auto"),  # what tuning left alone is the aligned model's
        ("tuned", "safe", "base", "weights"),
    ],
)
def test_full_weights(lab, tuned, aligned, base, space):
    model, values, _ = masked(lab, (tuned,), aligned, base=base, space=space)
    new, old = (lab.plain(n) if n.startswith(("full", "base", "tied")) else lab.adapted(n) for n in (tuned, aligned))
    with values.reading("ones"):
        same(logits(model), logits(new))
    with values.reading("zeros"):
        same(logits(model), logits(old))


@pytest.mark.parametrize("rescale", ["none", "mean"])
def test_rank_masks_reach_the_row_of_a_and_the_column_of_b(lab, rescale):
    model, values, (vector,) = masked(lab, granularity="rank", sampling="direct", rescale=rescale)
    torch.manual_seed(0)
    tensors = {}
    for name in vector.names:
        key = name.replace("lora_A", "lora").replace("lora_B", "lora")
        if "lora_A" in name:
            values.values[key].data = torch.rand(4)
        mask = values.values[key].detach()
        mask = mask / mask.mean() if rescale == "mean" else mask
        mask = mask.reshape(4, 1) if "lora_A" in name else mask.reshape(1, 4)
        tensors[name] = vector.aligned(name) + mask * vector.delta(name)
    assert len(values.values) == 4
    same(logits(model), logits(with_factors(lab, tensors)))


def test_heads_and_norms_by_hand(lab):
    model, values, (vector,) = masked(
        lab, granularity="head", head_size=8, sampling="direct", rescale="norm", initial=1.0
    )
    torch.manual_seed(0)
    tensors = {}
    for name in vector.names:
        values.values[name].data = torch.rand(values.values[name].shape)
        mask, delta = values.values[name].detach(), vector.delta(name)
        if "q_proj.lora_B" in name:
            assert mask.shape == (4, 1)  # four heads of eight rows
            mask = mask.repeat_interleave(8, 0)
        else:
            assert mask.shape == (1, 1)
        tensors[name] = vector.aligned(name) + mask * delta * (delta.norm() / (mask * delta).norm())
    same(logits(model), logits(with_factors(lab, tensors)))


def test_norms_of_two_task_vectors_are_kept_apart(lab):
    model, values, vectors = masked(
        lab, ("tuned", "tuned2"), fusion=Fusion("average"), sampling="direct", rescale="norm", initial=1.0
    )
    torch.manual_seed(0)
    tensors = {}
    for name in vectors[0].names:
        mask = values.values[name].data = torch.rand(values.values[name].shape)
        deltas = [vector.delta(name) for vector in vectors]
        kept = [mask * delta * (delta.norm() / (mask * delta).norm()) for delta in deltas]
        tensors[name] = vectors[0].aligned(name) + sum(kept) / 2
    same(logits(model), logits(with_factors(lab, tensors)))


@pytest.mark.parametrize("fusion", [Fusion("average"), Fusion("ties", {"keep": 0.3}), Fusion("dare", seed=3)])
def test_two_task_vectors(lab, fusion):
    model, values, vectors = masked(lab, ("tuned", "tuned2"), fusion=fusion, initial=1.5)
    names = vectors[0].names

    def deltas(name):
        return [vector.delta(name) for vector in vectors]

    def wanted(m):
        masked_deltas = {n: [m * d for d in deltas(n)] for n in names}
        statistics = fusion.statistics(names, masked_deltas.__getitem__)  # TIES trims what the mask leaves
        return {n: vectors[0].aligned(n) + fusion.combine(n, masked_deltas[n], statistics) for n in names}

    with values.reading("ones"):
        same(logits(model), logits(with_factors(lab, wanted(1.0))))
    same(logits(model), logits(with_factors(lab, wanted(torch.sigmoid(torch.tensor(1.5))))))


def test_ties_thresholds_follow_the_mask(lab):
    """With half of the entries masked away, a fifth of the rest is trimmed by what is left, not by what there was."""
    fusion = Fusion("ties", {"keep": 0.3, "weight": 1.0})
    model, values, vectors = masked(lab, ("tuned", "tuned2"), fusion=fusion, sampling="direct", initial=1.0)
    names = vectors[0].names
    first = logits(model)
    torch.manual_seed(0)
    for key in values.values:
        values.values[key].data = (torch.rand(values.values[key].shape) > 0.5).float()
    values.refresh()
    kept = {n: [values.values[n].detach() * v.delta(n) for v in vectors] for n in names}
    everything = [torch.cat([kept[n][k].flatten() for n in names]).abs() for k in range(2)]
    bounds = [float(flat.sort(descending=True).values[round(0.3 * len(flat)) - 1]) for flat in everything]
    unmasked = [torch.cat([v.delta(n).flatten() for n in names]).abs() for v in vectors]
    before = [float(flat.sort(descending=True).values[round(0.3 * len(flat)) - 1]) for flat in unmasked]
    assert all(bound < 0.9 * old for bound, old in zip(bounds, before, strict=True))
    tensors = {}
    for n in names:
        a, b = (d * (d.abs() >= bound) for d, bound in zip(kept[n], bounds, strict=True))
        sign = torch.sign(a + b)
        agree = [(torch.sign(d) == sign) & (d != 0) for d in (a, b)]
        count = (agree[0].float() + agree[1].float()).clamp_min(1)
        tensors[n] = vectors[0].aligned(n) + (a * agree[0] + b * agree[1]) / count
    assert not torch.allclose(logits(model), first, atol=1e-3)
    same(logits(model), logits(with_factors(lab, tensors)))


@pytest.mark.parametrize("fusion", [Fusion("average"), Fusion("dare", seed=3), Fusion("ties", {"keep": 0.5})])
@pytest.mark.parametrize("rescale", ["none", "mean", "norm"])
def test_masks_of_their_own(lab, fusion, rescale):
    model, values, vectors = masked(
        lab, ("tuned", "tuned2"), fusion=fusion, sampling="direct", initial=1.0, per_task=True, rescale=rescale
    )
    names = vectors[0].names
    assert set(values.values) == {f"task{k}:{n}" for k in range(2) for n in names}
    torch.manual_seed(0)
    for key in values.values:
        values.values[key].data = torch.rand(values.values[key].shape)
    values.refresh()

    def deltas(name):
        found = []
        for k, vector in enumerate(vectors):
            mask, delta = values.values[f"task{k}:{name}"].detach(), vector.delta(name)
            part = delta * (mask / mask.mean() if rescale == "mean" else mask)
            found.append(part * delta.norm() / part.norm() if rescale == "norm" else part)
        return found

    statistics = fusion.statistics(names, deltas)
    wanted = {n: vectors[0].aligned(n) + fusion.combine(n, deltas(n), statistics) for n in names}
    same(logits(model), logits(with_factors(lab, wanted)))
    logits_sum = model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum()
    logits_sum.backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in values.parameters())
    masks = values.masks_of(values.values, values.settings)
    assert [set(mask.values) for mask in masks] == [set(names)] * 2 and not masks[0].settings.per_task
    assert len(set(values.keep_rates())) == 8  # four kinds of factors, two tasks


def test_every_parameter_that_tuning_changed_has_a_mask(lab):
    for tuned, count in (("full", 14), ("full_all", 21)):
        model, values, (vector,) = masked(lab, (tuned,), "base", granularity="tensor")
        changed = {name for name in vector.names if bool(vector.delta(name).any())}
        assert set(values.values) == changed and len(changed) == count
        # nothing of the model is held twice: one entry of each masked parameter is left, beside θ_a and τ
        held = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        sizes = {name: vector.delta(name).numel() for name in vector.names}
        assert held == sum(sizes.values()) + sum(sizes[name] + 1 for name in changed)


@pytest.mark.parametrize("tied", [True, False])
def test_layers_of_other_kinds(tmp_path, tied):
    """GPT-2: Conv1D with biases, positions, LayerNorm, a head that is tied to the embedding or not; mixed by hand."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied)
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(GPT2LMHeadModel(config).eval())
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        models[-1].save_pretrained(tmp_path / str(seed))
    vector = task_vector(open_checkpoint(tmp_path / "1"), open_checkpoint(tmp_path / "0"))
    model, plan = models[2], MaskSettings(sampling="direct", initial=0.25)
    values = install_masks(model, [vector], plan, seed=0, combine=lambda n, d: d[0], linear=True)
    with values.reading("ones"):
        same(logits(model), logits(models[1]))
    with values.reading("zeros"):
        same(logits(model), logits(models[0]))
    with torch.no_grad():
        for mixed, tuned in zip(models[0].parameters(), models[1].parameters(), strict=True):
            mixed.lerp_(tuned, 0.25)
    same(logits(model), logits(models[0]))
    assert len(values.values) == len(list(models[0].parameters()))
    assert model.transformer.wte.num_embeddings == 97 and model.transformer.wte.weight.shape == (97, 16)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    assert all(bool(value.grad.any()) for value in values.values.values())


def test_a_weight_that_is_formed_again_has_the_same_gradient(lab):
    tokens, found = torch.tensor([[1, 2, 3, 9]]), []
    for again in (True, False):
        model, values, _ = masked(lab, ("full_all",), "base")
        layers = [m for m in model.modules() if isinstance(m, MaskedModule)]
        for layer in layers:
            layer.again = again
        model(input_ids=tokens).logits.square().sum().backward()
        found.append({key: value.grad for key, value in values.values.items()})
    assert len(layers) == 21
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key]) and float(gradient.abs().sum()) > 0


@pytest.mark.parametrize("granularity", ["entry", "row", "column"])
@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("method", ["average", "dare"])
def test_few_rows_of_an_embedding_that_several_models_share(lab, method, per_task, granularity, monkeypatch):
    """DARE drops by the tensor's entries, so that of it no row can be formed alone."""
    index, found, options = torch.tensor([0, 3, 4, 90]), [], {"granularity": granularity, "per_task": per_task}
    model, values, _ = masked(
        lab, ("base", "full2"), "full_all", Fusion(method), apart=True, sampling="direct", **options
    )
    torch.manual_seed(0)
    for value in values.values.values():
        value.data.normal_()
    weight = model.model.embed_tokens.weights["weight"]
    for rows in (weight(), weight.rows(index)):
        rows = rows[index] if rows.shape[0] > 4 else rows
        found.append((rows, torch.autograd.grad(rows.square().sum(), list(weight.logits))))
    assert torch.equal(found[0][0], found[1][0]) and len(found[0][1]) == 1 + per_task
    for whole, alone in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(whole, alone, rtol=1e-6, atol=0)
        assert float(alone.abs().sum()) > 0
    formed = []
    monkeypatch.setattr(weight, "forward", lambda: formed.append(1) or torch.zeros(weight.aligned.shape))
    weight.rows(index)
    assert len(formed) == (method == "dare")


def test_weights_in_bfloat16_with_logits_in_float32(lab):
    vectors = [task_vector(lab.open("full_all"), lab.open("base"))]
    model = lab.plain().to(torch.bfloat16)
    values = install_masks(
        model, vectors, MaskSettings(), seed=0, combine=lambda n, d: d[0], linear=True, storage=torch.bfloat16
    )
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in values.parameters()} == {torch.float32}
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in values.parameters())
    with values.reading("ones"):
        torch.testing.assert_close(logits(model).float(), logits(lab.plain("full_all")), rtol=0.1, atol=0.5)


def test_only_the_logits_learn(lab):
    model, values, _ = masked(lab)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    ours = {id(parameter) for parameter in values.parameters()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == ours
    assert all(parameter.grad is not None for parameter in values.parameters())
    assert values.removed_share().item() == pytest.approx(0.5)


@pytest.mark.parametrize("granularity", ["entry", "row", "column", "rank", "head", "tensor", "layer"])
def test_shares_are_of_entries_whatever_shares_a_logit(lab, granularity, tmp_path):
    _, values, (vector,) = masked(lab, granularity=granularity, head_size=8)
    torch.manual_seed(1)
    with torch.no_grad():
        for logits in values.parameters():
            logits.copy_(3 * torch.randn_like(logits))
    masks = {name: values.mask(name) * torch.ones(vector.shape(name)) for name in vector.names}
    kept = float(sum(mask.double().sum() for mask in masks.values())) / sum(mask.numel() for mask in masks.values())
    assert values.removed_share().item() == pytest.approx(1 - kept, abs=1e-6)
    exported = {key: torch.sigmoid(value.detach()) for key, value in values.values.items()}
    (mask,) = values.masks_of(exported, values.settings)
    assert mask.keep_rate == pytest.approx(kept, abs=1 / 255)
    mask.save(tmp_path)
    assert Mask.load(tmp_path).keep_rate == mask.keep_rate
    assert mean_keep(keep_rates(mask)) == pytest.approx(mask.keep_rate, abs=1e-9)
    up = [float(mask.double().mean()) for name, mask in masks.items() if "q_proj.lora_A" in name]
    if granularity not in ("rank", "layer"):
        (found,) = [rate for module, rate in values.keep_rates().items() if "q_proj.lora_A" in module]
        assert found == pytest.approx(sum(up) / len(up), abs=1e-6)


def test_the_digest_tells_task_vectors_apart(lab):
    digests = [masked(lab, (name,))[1].vectors_digest for name in ("tuned", "tuned", "tuned2")]
    assert digests[0] == digests[1] != digests[2]


def test_a_masked_layer_has_its_base_s_weight_and_bias_as_in_peft(tmp_path):
    """Jamba reads both of dt_proj past its forward."""
    from peft import LoraConfig, get_peft_model
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
        use_mamba_kernels=False, mamba_dt_rank=4,
    )  # fmt: skip
    JambaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base", cache=tmp_path / "cache")
    wanted = get_peft_model(load_model(base), LoraConfig(r=4, target_modules=["dt_proj", "q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wanted.save_pretrained(tmp_path / "tuned")
    tuned = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'tuned'}", cache=tmp_path / "cache")
    model = load_model(base)
    plain = model.model.layers[0].mamba.dt_proj
    values = install_masks(
        model, [task_vector(tuned, base)], MaskSettings(), seed=0, combine=lambda n, d: d[0], linear=True
    )
    masked = model.model.layers[0].mamba.dt_proj
    assert masked.weight is plain.weight and masked.bias is plain.bias and masked.in_features == 4
    peft = wanted.base_model.model.model.layers[0].mamba.dt_proj
    assert torch.equal(masked.weight, peft.weight) and torch.equal(masked.bias, peft.bias)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = masked.nothing
    with values.reading("ones"):
        same(logits(model), logits(wanted))


def test_what_does_not_fit(lab):
    vectors = [task_vector(lab.open(name), lab.open("base")) for name in ("tuned", "full")]
    common = {"seed": 0, "combine": lambda name, deltas: deltas[0], "linear": True}
    with pytest.raises(InputError, match="cover different tensors"):
        install_masks(lab.plain(), vectors, MaskSettings(), **common)
    with pytest.raises(InputError, match="no linear layer"):
        install_masks(torch.nn.Linear(2, 2), vectors[:1], MaskSettings(), **common)
