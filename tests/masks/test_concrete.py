"""The relaxed Bernoulli mask against torch.distributions and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import RelaxedBernoulli

from resafe.errors import InputError
from resafe.masks.concrete import (
    MaskSettings,
    check_rescale,
    export_mask,
    form_mask,
    has_heads,
    logits_key,
    logits_shape,
    norm_kept,
    oriented,
    relaxed_draw,
    rescaled,
    top_of_single,
)
from resafe.tensors import uniform

A, B = "base_model.model.model.layers.0.q_proj.lora_A.weight", "base_model.model.model.layers.0.q_proj.lora_B.weight"
PHI = torch.tensor([[-2.0, -0.5, 0.0], [0.3, 1.0, 4.0]])


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_draw_is_that_of_torch_distributions(temperature):
    torch.manual_seed(0)
    noise = torch.rand(PHI.shape)
    torch.manual_seed(0)
    wanted = RelaxedBernoulli(torch.tensor(temperature), logits=PHI).rsample()
    torch.testing.assert_close(relaxed_draw(PHI, noise, temperature), wanted, rtol=1e-4, atol=1e-6)


def test_draw_by_formula_and_its_share():
    settings = MaskSettings(sampling="relaxed", temperature=0.5)
    mask = form_mask(PHI, settings, 3, "w", 7)
    u = uniform((2, 3), 3, "mask", "w", "7")
    torch.testing.assert_close(mask, 1 / (1 + ((1 - u) / u * torch.exp(-PHI)) ** 2))
    assert not torch.equal(mask, form_mask(PHI, settings, 3, "w", 8))
    many = form_mask(torch.full((100_000,), 1.0), settings, 0, "w", 0)
    assert abs(float((many > 0.5).float().mean()) - 0.731059) < 0.006  # P(m > ½) = σ(φ), four standard errors


def test_straight_through_has_the_soft_gradient():
    hard_logits, soft_logits = PHI.clone().requires_grad_(), PHI.clone().requires_grad_()
    hard = form_mask(hard_logits, MaskSettings(sampling="straight_through"), 0, "w", 0)
    soft = form_mask(soft_logits, MaskSettings(sampling="relaxed"), 0, "w", 0)
    weights = torch.arange(6.0).reshape(2, 3)
    (hard * weights).sum().backward()
    (soft * weights).sum().backward()
    assert torch.equal(hard.detach().round(decimals=6), (soft > 0.5).float())
    torch.testing.assert_close(hard_logits.grad, soft_logits.grad)


def test_other_samplings():
    assert torch.equal(form_mask(PHI, MaskSettings(), 0, "w", 0), torch.sigmoid(PHI))
    assert form_mask(PHI, MaskSettings(sampling="direct"), 0, "w", 0) is PHI


def test_rescale_gradient_runs_through_the_mean():
    mask = torch.tensor([0.2, 0.9, 0.5, 0.4], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)

    def value(m):
        return (rescaled(m, "mean") ** 2 * weights).sum()

    value(mask).backward()
    step = 1e-6
    for i in range(4):
        shift = step * torch.eye(4, dtype=torch.float64)[i]
        numeric = (value(mask.detach() + shift) - value(mask.detach() - shift)) / (2 * step)
        assert mask.grad[i].item() == pytest.approx(numeric.item(), rel=1e-6)
    assert rescaled(mask, "mean").mean().item() == pytest.approx(1)
    assert rescaled(mask, "none") is mask


def of(granularity, head_size=None):
    return MaskSettings(granularity=granularity, head_size=head_size)


def test_a_layer_shares_its_logit_and_what_has_no_number_has_its_own():
    assert logits_key(A, "layer") == logits_key(B, "layer") == "base_model.model.model.layers.0"
    assert logits_key("model.layers.11.mlp.experts.7.w1.weight", "layer") == "model.layers.11"
    assert logits_key("lm_head.weight", "layer") == "lm_head.weight"
    assert logits_shape(A, (4, 32), of("layer")) == (1,)


def test_heads_own_rows_of_the_projections_in_and_columns_of_the_one_out():
    q, o, mlp = (f"model.layers.0.{part}.weight" for part in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"))
    heads = of("head", 8)
    assert logits_shape(q, (16, 32), heads) == (2, 1)
    assert logits_shape(o, (32, 24), heads) == (1, 3)
    assert logits_shape(mlp, (64, 32), heads) == (1, 1)
    assert logits_shape(A, (4, 32), heads) == (1, 1)  # what goes into all heads
    assert logits_shape(B, (64, 4), heads) == (8, 1)
    mask = oriented(q, torch.tensor([[0.25], [1.0]]), heads)
    assert mask.shape == (16, 1) and mask[:8].unique().tolist() == [0.25] and mask[8:].unique().tolist() == [1.0]
    mask = oriented(o, torch.tensor([[0.0, 0.5, 1.0]]), heads)
    assert mask.shape == (1, 24) and mask[0, [0, 7, 8, 15, 16, 23]].tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert oriented(mlp, torch.ones(1, 1), heads).shape == (1, 1)
    with pytest.raises(InputError, match="heads of width 7 do not fit"):
        logits_shape(q, (16, 32), of("head", 7))
    assert has_heads(q, (16, 32), 8) and not has_heads(q, (8, 32), 8) and not has_heads(mlp, (64, 32), 8)


@pytest.mark.parametrize("kind", ["GPTNeoX", "Bloom", "Falcon"])
def test_a_run_of_a_head_s_width_is_of_one_head_where_all_three_projections_are_one(kind):
    """Rows zeroed one run at a time: of the output's input, which the dense layer takes, one head alone changes."""
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    own = {
        "GPTNeoX": {"intermediate_size": 64},
        "Bloom": {"n_layer": 1, "n_head": 4},
        "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **own[kind]})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    ((name, weight),) = [p for p in model.named_parameters() if p[0].endswith("query_key_value.weight")]
    dense = model.get_submodule(name.removesuffix("query_key_value.weight") + "dense")
    assert logits_shape(f"{name.removesuffix('query_key_value.weight')}dense.weight", (32, 32), of("head", 8)) == (1, 4)
    held = []
    dense.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0].detach().view(-1, 4, 8)))
    runs, groups = weight.shape[0] // 8, 2 if kind == "Falcon" else 1
    assert logits_shape(name, tuple(weight.shape), of("head", 8)) == (runs, 1)
    with torch.no_grad():
        weight.mul_(20)
        model(torch.arange(5, 13)[None])
        whole = weight.clone()
        changed = []
        for run in range(runs):
            mask = torch.ones(runs, 1)
            mask[run] = 0
            weight.copy_(whole * oriented(name, mask, of("head", 8)))
            model(torch.arange(5, 13)[None])
            changed.append([h for h in range(4) if not torch.allclose(held[-1][:, h], held[0][:, h], atol=1e-6)])
    if groups == 1:
        assert changed == [[head] for head in range(4) for _ in range(3)]
    else:  # two groups of two queries, with a key and a value each
        assert changed == [[0], [1], [0, 1], [0, 1], [2], [3], [2, 3], [2, 3]]


def test_the_norm_is_kept_and_its_gradient_follows():
    delta, mask = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64), torch.tensor([0.5, 1.0, 0.2], dtype=torch.float64)
    kept = norm_kept(delta * mask, delta)
    assert kept.tolist() == pytest.approx([1.5 * 5 / 18.25**0.5, 4 * 5 / 18.25**0.5, 0.0])
    assert norm_kept(torch.zeros(3), torch.ones(3)).tolist() == [0, 0, 0]
    mask.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: norm_kept(delta * m, delta), mask)


@pytest.mark.parametrize("scaled", [lambda m: rescaled(m, "mean"), lambda m: norm_kept(1e3 * m, torch.full((4,), 1e3))])
def test_nothing_kept_stays_nothing_with_a_gradient(scaled):
    mask = torch.zeros(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(scaled(mask).sum(), mask)
    assert scaled(mask).tolist() == [0, 0, 0, 0] and bool(gradient.isfinite().all())


@pytest.mark.parametrize("granularity", ["tensor", "layer", "head"])
def test_a_tensor_s_only_value_is_not_rescaled(granularity):
    for rescale in ("mean", "norm"):
        with pytest.raises(InputError, match="scaled back to what it was"):
            check_rescale(MaskSettings(granularity=granularity, rescale=rescale))
    check_rescale(MaskSettings(granularity=granularity))


def test_top_of_tensors_with_one_value_each():
    logits = {key: torch.full((1, 1), value) for key, value in {"a": 0.1, "b": 2.0, "c": -1.0, "d": 0.5}.items()}
    sizes = {"a": 20, "b": 50, "c": 20, "d": 10}  # by φ: b 50, d 60, a 80, c 100

    def kept(keep):
        return "".join(sorted(key for key, mask in top_of_single(logits, sizes, keep).items() if float(mask)))

    assert [kept(keep) for keep in (0.0, 0.2, 0.3, 0.56, 0.65, 0.71, 0.89, 0.9, 1.0)] == [
        "", "", "b", "bd", "bd", "abd", "abd", "abcd", "abcd",
    ]  # fmt: skip


def test_shapes_and_orientation():
    shapes = {g: logits_shape(A, (4, 32), of(g)) for g in ("entry", "row", "column", "tensor", "rank")}
    assert shapes == {"entry": (4, 32), "row": (4, 1), "column": (1, 32), "tensor": (1, 1), "rank": (4,)}
    assert logits_shape(B, (64, 4), of("rank")) == (4,)
    assert logits_shape("bias", (7,), of("row")) == logits_shape("bias", (7,), of("column")) == (7,)
    assert logits_key(A, "rank") == logits_key(B, "rank") == A.replace("lora_A", "lora")
    assert logits_key(A, "entry") == A
    mask = torch.tensor([1.0, 0.0, 1.0, 0.5])
    assert (torch.ones(4, 32) * oriented(A, mask, of("rank")))[:, 3].tolist() == mask.tolist()
    assert (torch.ones(64, 4) * oriented(B, mask, of("rank")))[5].tolist() == mask.tolist()
    assert oriented(A, mask, of("row")) is mask
    with pytest.raises(InputError, match="needs LoRA factors"):
        logits_shape("model.layers.0.weight", (4, 4), of("rank"))


def test_exports():
    settings = MaskSettings(sampling="relaxed", temperature=0.5)
    assert torch.equal(export_mask(PHI, settings, "soft"), torch.sigmoid(PHI))
    assert export_mask(PHI, settings, "threshold").tolist() == [[0, 0, 0], [1, 1, 1]]
    assert export_mask(PHI, settings, "top_k", keep=2 / 3).tolist() == [[0, 0, 1], [1, 1, 1]]
    assert torch.equal(
        export_mask(PHI, settings, "last_draw", seed=1, key="w", step=9), form_mask(PHI, settings, 1, "w", 9)
    )
    noise = uniform((2, 3), 1, "export", "w")
    sampled = export_mask(PHI, settings, "sample", seed=1, key="w")
    assert torch.equal(sampled, (PHI + torch.logit(noise) > 0).float())
    many = export_mask(torch.full((100_000,), -1.0), settings, "sample")
    assert abs(float(many.mean()) - 0.268941) < 0.006
