"""Masks over models that hold their tensors under other names than their files do, or twice."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from resafe.api import apply_mask
from resafe.checkpoints import load_model, open_checkpoint
from resafe.deltas import task_vector
from resafe.engine import Input, Request, build_plan, execute
from resafe.errors import InputError
from resafe.masks import Mask, MaskSettings, install_masks
from resafe.masks.average import averaged
from resafe.realign import REALIGN, Problem, write_realigned
from resafe.realign.mask_family import mask_family
from tests.tiny import PAIRS, Source, logits

SIZES = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gpt2": ("GPT2", {"vocab_size": 97, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "neox": ("GPTNeoX", {**SIZES, "intermediate_size": 32}),
    "mixtral": ("Mixtral", {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **SIZES,
            "head_dim": 8,
            "num_key_value_heads": 1,
            "moe_intermediate_size": 8,
            "num_experts": 12,
            "num_experts_per_tok": 5,
        },
    ),
    "hrm": ("HrmText", {**SIZES, "intermediate_size": 32, "head_dim": 8, "H_cycles": 1, "L_cycles": 1}),
    "opt": ("OPT", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64}),
    "biogpt": ("BioGpt", {**SIZES, "intermediate_size": 32, "max_position_embeddings": 64}),
}


def saved(path, kind, prefix=""):
    """An aligned and a tuned model of an architecture; `prefix` is taken off the names in the files."""
    family, settings = MODELS[kind]
    heads = {"GPT2": "GPT2LMHeadModel"}
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, heads.get(family, f"{family}ForCausalLM"))(config).eval()
    for name in ("aligned", "tuned"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(path / name)
        file = path / name / "model.safetensors"
        tensors = {key.removeprefix(prefix): value for key, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return [open_checkpoint(path / name, cache=path / "cache") for name in ("aligned", "tuned")]


def masked(aligned, vector, model=None, **settings):
    model = model or load_model(aligned)
    values = install_masks(
        model, [vector], MaskSettings(**settings), seed=0, combine=lambda n, d: d[0], linear=True, by_entry=True
    )
    return model, values


@pytest.mark.parametrize(
    ("kind", "prefix", "odd"),
    [
        ("gpt2", "transformer.", "h.0.attn.c_attn.weight"),  # as on the Hub: of the model without its head
        ("neox", "", "embed_out.weight"),  # lm_head.weight in memory
        ("opt", "", "model.decoder.embed_positions.weight"),  # looked up by an attention mask
        ("biogpt", "", "biogpt.embed_positions.weight"),
    ],
)
def test_every_tensor_of_the_files_is_masked(tmp_path, kind, prefix, odd):
    aligned, tuned = saved(tmp_path, kind, prefix)
    vector = task_vector(tuned, aligned)
    assert odd in vector.names
    model, values = masked(aligned, vector, sampling="direct", initial=0.25)
    assert set(values.values) == set(vector.names)
    with values.reading("ones"):
        torch.testing.assert_close(logits(model), logits(load_model(tuned)), rtol=1e-5, atol=1e-6)
    with values.reading("zeros"):
        torch.testing.assert_close(logits(model), logits(load_model(aligned)), rtol=1e-5, atol=1e-6)
    assert float((logits(load_model(tuned)) - logits(load_model(aligned))).abs().max()) > 0.1
    quarter = {name: torch.full(vector.shape(name), 64 / 255) for name in vector.names}
    for name, value in quarter.items():
        values.values[name].data = value
    found = mask_family(Problem([vector]), Mask.of(quarter, MaskSettings()), (1.0,)).at(1.0)
    write_realigned(tmp_path / "out", [vector], found, tuned, "")
    wanted = logits(load_model(open_checkpoint(tmp_path / "out", cache=tmp_path / "cache")))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    assert float(values.values[odd].grad.abs().sum()) > 0


def test_only_rows_of_words_are_looked_up(tmp_path):
    """BioGPT scales its words and finds positions by an attention mask: of these the whole weight is formed."""
    aligned, tuned = saved(tmp_path, "biogpt")
    model, _ = masked(aligned, task_vector(tuned, aligned))
    formed = []
    for name in ("embed_tokens", "embed_positions"):
        weight = getattr(model.biogpt, name).weights["weight"]
        weight.register_forward_hook(lambda *_, name=name: formed.append(name))
    model.biogpt(input_ids=torch.tensor([[1, 2, 3]]))
    assert formed == ["embed_positions"]


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def stored_twice(lab, tmp_path):
    """The tied models of the laboratory, with the head stored beside the embedding."""
    for name in ("tied", "tied_full"):
        shutil.copytree(lab.root / name, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, file, metadata={"format": "pt"})
    return [open_checkpoint(tmp_path / name, cache=tmp_path / "cache") for name in ("tied", "tied_full")]


@pytest.mark.parametrize("method", ["somf", "random_mask", "dare", "engine"])
def test_a_head_that_is_stored_beside_its_embedding_stays_tied(lab, tmp_path, stored_twice, method):
    aligned, tuned = stored_twice
    vector = task_vector(tuned, aligned)
    assert HEAD not in vector.names and vector.copies == {HEAD: EMBEDDING}
    of = Problem([vector], pairs=PAIRS, source=Source(lab, "tied"))
    out, chosen = tmp_path / "out", REALIGN.get("somf" if method == "engine" else method)
    learns = {"preset": "labels", "steps": 2, "batch_size": 4, "warm_share": 0.0, "initial": 0.5}
    family = chosen.function(of, **(learns if chosen.traits["trains"] else {}))
    if method == "engine":
        mask = averaged([family.mask, family.mask])  # keeps what it knows of the copy
        assert mask.provenance["copies"] == {HEAD: EMBEDDING}
        mask.save(tmp_path / "mask")
        request = Request(
            str(tmp_path / "tied"), (Input(str(tmp_path / "tied_full"), "t", 1.0),), out, "mask",
            {"file": str(tmp_path / "mask")},
        )  # fmt: skip
        assert execute(build_plan(request, tmp_path / "cache"), threads=1).committed
    else:
        at = 1.0 if method == "somf" else family.strengths[0]
        write_realigned(out, of.vectors, family.at(at), tuned, "")
    written = load_file(out / "model.safetensors")
    assert set(written) == set(tuned.tensors)
    assert torch.equal(written[HEAD], written[EMBEDDING])
    for end in (aligned, tuned):
        assert float((written[HEAD] - end.read(HEAD)).abs().max()) > 0.01
    if family.mask is not None:
        wanted = vector.aligned(EMBEDDING) + family.mask.values[EMBEDDING] * vector.delta(EMBEDDING)
        torch.testing.assert_close(written[HEAD], wanted, rtol=1e-5, atol=1e-6)
    model = lab.plain(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_mask_file_over_models_that_are_stored_twice(tmp_path, stored_twice):
    aligned, tuned = stored_twice
    vector = task_vector(tuned, aligned)
    Mask.of({name: torch.ones(vector.shape(name)) for name in vector.names}, MaskSettings()).save(tmp_path / "mask")
    apply_mask(tmp_path / "mask", aligned, [tuned], out=tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(written[name], tuned.read(name), atol=1e-6) for name in tuned.tensors)


def test_a_head_that_tuning_untied(lab, tmp_path, stored_twice):
    """The aligned model loads as tied, so that one parameter would stand for two different changes."""
    aligned, _ = stored_twice
    file = tmp_path / "tied_full" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: tensors[HEAD] + 0.1}, file, metadata={"format": "pt"})
    vector = task_vector(open_checkpoint(tmp_path / "tied_full", cache=tmp_path / "cache"), aligned)
    assert HEAD in vector.names
    with pytest.raises(InputError, match=r"changed 1 tensors.*\n  (lm_head|model.embed_tokens).weight"):
        masked(aligned, vector)
