"""Which dtype a precision stands for, and what it does to models, training and masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from resafe.checkpoints import load_model, resolve_dtype
from resafe.checkpoints.attention import grouped_attention, short_attention
from resafe.deltas import task_vector
from resafe.errors import InputError
from resafe.fusion import Fusion
from resafe.masks import MaskSettings, install_masks
from resafe.training import SftSettings, train_sft
from tests.tiny import KEEP, TOKENS, Source, logits


def test_named_precisions_are_themselves():
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("bfloat16", "cuda") == torch.bfloat16
    with pytest.raises(InputError, match="no precision 'bf16'"):
        resolve_dtype("bf16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capabilities", "wanted"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_auto_follows_the_processor(monkeypatch, capabilities, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_dtype("auto", "cpu") == wanted


@pytest.mark.parametrize(("known", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_with_an_older_torch(monkeypatch, known, wanted):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: known, raising=False)
    assert resolve_dtype("auto", "cpu") == wanted


def test_auto_asks_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert resolve_dtype("auto", "cuda") == torch.float32


def test_an_adapter_that_is_not_merged_stays_float32(lab):
    model = load_model(lab.open("tuned"), dtype="bfloat16", merge=False)
    kinds = {"lora" if "lora_" in name else "base": weight.dtype for name, weight in model.named_parameters()}
    assert kinds == {"lora": torch.float32, "base": torch.bfloat16}
    merged = load_model(lab.open("tuned"), dtype="bfloat16")
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}
    whole = load_model(lab.open("tuned"))
    for name, weight in merged.state_dict().items():  # base and sum, each below 1, rounded once: 2⁻⁹ apiece
        torch.testing.assert_close(weight.float(), whole.state_dict()[name], rtol=2**-8, atol=2**-8)


def test_training_in_bfloat16_follows_float32(lab, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        result = train_sft(
            model=load_model(lab.open("safe"), dtype=dtype, merge=False),
            tokenizer=Source(lab).tokenizer,
            examples=KEEP,
            settings=SftSettings(steps=12, batch_size=3, learning_rate=1e-2, device="cpu", save_every=0),
            out=tmp_path / dtype,
        )
        losses[dtype] = result.losses
        trained = {w.dtype for n, w in result.model.named_parameters() if "lora_" in n}
        assert trained == {torch.float32}
    # a bfloat16 forward is good to some 2⁻⁸ of a loss of about 5 nats; the curve falls far more than that
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.02, atol=0.02)
    assert losses["bfloat16"][-1] < losses["bfloat16"][0] - 1


@pytest.mark.parametrize(("tuned", "safe"), [("tuned", "safe"), ("full", "base")])
def test_masks_on_bfloat16_weights(lab, tuned, safe):
    fusion = Fusion("task_arithmetic")
    found, gradients = {}, {}
    for dtype in ("float32", "bfloat16"):
        model = load_model(lab.open("base"), dtype=dtype)
        vectors = [task_vector(lab.open(tuned), lab.open(safe))]
        settings = MaskSettings(granularity="row", initial=0.5)
        logits = install_masks(model, vectors, settings, seed=0, combine=fusion.combine, linear=True)
        output = model(input_ids=TOKENS).logits.float().log_softmax(-1)
        output[:, :, 7].sum().backward()
        found[dtype], gradients[dtype] = output.detach(), {n: p.grad for n, p in logits.values.items()}
        assert {p.dtype for p in logits.parameters()} == {torch.float32}
    assert (found["bfloat16"] - found["float32"]).abs().mean() < 0.05
    flat = {d: torch.cat([g.flatten() for g in gradients[d].values()]) for d in gradients}
    assert torch.cosine_similarity(flat["float32"], flat["bfloat16"], dim=0) > 0.99


def test_short_sequences_on_a_cpu_take_plain_attention(lab):
    def inside(model, longest):
        with short_attention(model, longest):
            return model.config._attn_implementation

    half = load_model(lab.open("base"), dtype="bfloat16")
    assert inside(half, 40) == "resafe_grouped"
    assert half.config._attn_implementation == "sdpa"
    assert inside(half, 4096) == "sdpa"
    assert inside(load_model(lab.open("base")), 40) == "sdpa"
    adapted = load_model(lab.open("tuned"), dtype="bfloat16", merge=False)
    with short_attention(adapted, 40):
        assert adapted.get_base_model().config._attn_implementation == "resafe_grouped"
        plain = logits(adapted)
    exact = logits(load_model(lab.open("tuned"), merge=False))
    assert (plain - exact).abs().mean() < 1.5 * (logits(adapted) - exact).abs().mean()  # no worse than torch's own
    half.set_attn_implementation("eager")
    assert inside(half, 40) == "eager"
    assert half.config._attn_implementation == "eager"


@pytest.mark.parametrize("shape", [(2, 6, 2, 5, 9), (3, 4, 4, 1, 7), (1, 8, 1, 4, 4)])  # batch, heads, key heads, …
def test_grouped_attention_is_torchs(shape):
    batch, heads, key_heads, positions, everything = shape
    generator = torch.Generator().manual_seed(0)

    def states(count, length):
        return torch.randn(batch, count, length, 16, generator=generator, dtype=torch.float64, requires_grad=True)

    query, key, value = states(heads, positions), states(key_heads, everything), states(key_heads, everything)
    mask = torch.full((batch, 1, positions, everything), float("-inf"), dtype=torch.float64).triu(
        everything - positions + 1
    )
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    found, weights = grouped_attention(torch.nn.Module().eval(), query, key, value, mask, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-6, atol=1e-6)  # weights pass through float32
    ours = torch.autograd.grad(found.square().sum(), (query, key, value))
    theirs = torch.autograd.grad(expected.square().sum(), (query, key, value))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_grouped_attention_drops_weights_in_training_only():
    states = torch.ones(1, 1, 400, 8)
    training, evaluating = torch.nn.Module().train(), torch.nn.Module().eval()
    torch.manual_seed(0)
    dropped, _ = grouped_attention(training, states, states, states, None, dropout=0.5)
    kept, _ = grouped_attention(evaluating, states, states, states, None, dropout=0.5)
    torch.testing.assert_close(kept, torch.ones_like(kept))
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert dropped.std() > 0.02  # each of the 400 weights of a row is 0 or doubled: 1/√400 = .05
