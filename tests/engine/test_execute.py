"""What the engine writes: the method's values to the last bit, however the work is cut, and everything around them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from resafe.checkpoints import open_checkpoint
from resafe.engine import Input, build_plan, execute, spans
from resafe.errors import InputError
from resafe.fusion import FUSION, Fusion

from .conftest import Farm, tensors, write


def fused(farm: Farm, out: str = "out", **changes):
    """Fuses, and reads the output."""
    run = {key: changes.pop(key) for key in ("threads", "rank", "world") if key in changes}
    outcome = execute(build_plan(farm.request(out, **changes)), **{"threads": 1, **run})
    assert outcome.committed
    found = open_checkpoint(farm.root / out)
    return {name: found.read(name).clone() for name in found.tensors}


def expected(farm: Farm, method: str, seed: int = 0, weights=(1.0, 1.0), **options):
    """The same, whole tensors in memory."""
    base, *tuned = farm.values
    fusion = Fusion(method, options, seed, ("a", "b"))
    names = [name for name, value in base.items() if value.is_floating_point()]
    whole = fusion.name == "slerp"

    def inputs(name):
        return [m[name].float() - (0 if whole else base[name].float()) for m in tuned]

    statistics = fusion.statistics(names, inputs)
    found = {}
    for name in names:
        value = fusion.combine(name, inputs(name), statistics, weights)
        found[name] = (value if whole else base[name].float() + value).to(base[name].dtype)
    return found | {"model.steps": base["model.steps"]}


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=2**-7, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", [method.name for method in FUSION if method.name != "mask"])  # see test_mask_method
def test_every_method_through_files(farm, name):
    found = fused(farm, method=name, threads=2)
    same(found, expected(farm, name))
    base = farm.values[0]["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(found["model.layers.0.self_attn.q_proj.weight"], base)


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("della", "multislerp", "tsv", "emr")]


@pytest.mark.parametrize("method", ["dare", "dare_ties", "ties", "sce", *LONG])
def test_the_bits_do_not_depend_on_how_the_work_is_cut(farm, method, monkeypatch):
    reference = fused(farm, "one", method=method, seed=3)
    monkeypatch.setattr(spans, "PIECE", 40)
    monkeypatch.setattr(spans, "_TASK", 100)
    for out, changes in {
        "two": {"threads": 2}, "small": {"max_shard_size": 1000}, "large": {"max_shard_size": "1GB", "threads": 3}
    }.items():  # fmt: skip
        found = fused(farm, out, method=method, seed=3, **changes)
        for name, value in reference.items():
            exact = FUSION.get(method).traits["first_pass"] is None or method in ("ties", "emr")
            if exact:
                assert torch.equal(found[name], value), (out, name)
            else:  # sums of squares are added in pieces: the last bit of float64 may differ
                torch.testing.assert_close(found[name], value, rtol=2**-8, atol=0)


def test_another_seed_draws_otherwise(farm):
    one, two = (fused(farm, f"s{seed}", method="dare", seed=seed) for seed in (0, 1))
    assert not torch.equal(one["model.embed_tokens.weight"], two["model.embed_tokens.weight"])


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_ranks_share_only_the_directory(farm, method):
    alone = fused(farm, "alone", method=method, max_shard_size=1500)
    request = farm.request("ranks", method=method, max_shard_size=1500)

    def rank(number):
        return execute(build_plan(request), threads=1, rank=number, world=3)

    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(rank, range(3)))
    assert sum(outcome.committed for outcome in outcomes) >= 1
    assert sum(outcome.redone for outcome in outcomes) == len(build_plan(request).units) > 3
    for path in (farm.root / "alone").glob("*.safetensors"):
        assert path.read_bytes() == (farm.root / "ranks" / path.name).read_bytes()
    assert torch.equal(alone["model.embed_tokens.weight"], load_file(
        farm.root / "ranks" / open_checkpoint(farm.root / "ranks").tensors["model.embed_tokens.weight"].file.name
    )["model.embed_tokens.weight"])  # fmt: skip


def test_dtype_and_sharding_of_the_output(farm):
    found = fused(farm, dtype="float32", max_shard_size=2000)
    assert {value.dtype for name, value in found.items() if name != "model.steps"} == {torch.float32}
    assert json.loads((farm.root / "out" / "config.json").read_text())["dtype"] == "float32"
    files = {info.file.name for info in open_checkpoint(farm.root / "out").tensors.values()}
    assert len(files) > 3
    like = open_checkpoint(farm.root / "base")
    assert {p.name for p in like.files} == {p.name for p in (farm.root / "base").glob("*.safetensors")}
    fused(farm, "same")
    assert {p.name for p in (farm.root / "same").glob("*.safetensors")} == {p.name for p in like.files}


def test_what_stands_around_the_weights(farm):
    fused(farm, method="ties", settings={"keep": 0.3})
    card = (farm.root / "out" / "README.md").read_text()
    base = open_checkpoint(farm.root / "base")
    assert base.digest in card and "arXiv 2306.01708" in card and "keep: 0.3" in card
    assert (farm.root / "out" / "tokenizer_config.json").is_file()
    assert not list(farm.root.glob(".*fusing*"))


def test_coefficients_reach_the_method(farm):
    weight = {"layers.1": [0.0, 2.0], "norm": 0.5, "default": 0.0}
    models = (Input(str(farm.root / "tuned1"), "a", weight), Input(str(farm.root / "tuned2"), "b", 0.0))
    found = fused(farm, models=models)
    base, tuned, _ = farm.values
    for name, factor in {"model.layers.1.self_attn.q_proj.weight": 2.0, "model.layers.0.norm.weight": 0.5}.items():
        wanted = base[name].float() + factor * (tuned[name].float() - base[name].float())
        torch.testing.assert_close(found[name], wanted.to(torch.bfloat16), rtol=2**-7, atol=0)
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_a_mean_of_whole_weights_does_not_read_the_base(farm):
    plan = build_plan(farm.request(method="average"))
    assert not plan.needs_base
    assert build_plan(farm.request(method="ties")).needs_base
    same(fused(farm, method="average"), expected(farm, "average"))


def test_not_a_number_is_named(farm):
    farm.values[1]["model.layers.1.norm.weight"][3] = float("nan")
    farm.values[1]["model.layers.0.norm.weight"][1:3] = float("inf")
    write(farm.root / "sick", farm.values[1])
    outcome = execute(build_plan(farm.request(models=(Input(str(farm.root / "sick"), "a"),))), threads=2)
    assert {k: v for r in outcome.receipts for k, v in r.nan.items()} == {"model.layers.1.norm.weight": 1}
    assert {k: v for r in outcome.receipts for k, v in r.inf.items()} == {"model.layers.0.norm.weight": 2}


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=5),
    kinds=st.tuples(DTYPES, DTYPES, DTYPES),
    shards=st.tuples(*[st.integers(1, 3)] * 3),
    size=st.one_of(st.none(), st.integers(8, 400)),
    method=st.sampled_from(["task_arithmetic", "average", "ties", "dare_ties", "sce", "della"]),
)
def test_any_shapes_dtypes_and_shardings(tmp_path_factory, shapes, kinds, shards, size, method):
    root = tmp_path_factory.mktemp("any")
    values = []
    for k, (kind, count) in enumerate(zip(kinds, shards, strict=True)):
        generator = torch.Generator().manual_seed(k)
        values.append({f"t{i}": torch.randn(s, generator=generator).to(kind) for i, s in enumerate(shapes)})
        write(root / f"m{k}", values[k], shards=min(count, len(shapes)))
    from resafe.engine import Request

    models = tuple(Input(str(root / f"m{k}"), str(k)) for k in (1, 2))
    request = Request(str(root / "m0"), models, root / "out", method, max_shard_size=size)
    assert execute(build_plan(request), threads=2).committed
    found = open_checkpoint(root / "out")
    fusion = Fusion(method, models=("1", "2"))
    taus = {n: [m[n].float() - values[0][n].float() for m in values[1:]] for n in values[0]}
    totals = fusion.statistics(sorted(taus), taus.__getitem__)
    for name, base in values[0].items():
        assert found.tensors[name].shape == tuple(base.shape)
        if base.numel():
            wanted = (base.float() + fusion.combine(name, taus[name], totals)).to(base.dtype)
            torch.testing.assert_close(found.read(name), wanted, rtol=2**-6, atol=2**-7)


def test_problems_are_found_at_once(farm):
    wrong = tensors(5)
    del wrong["model.layers.0.norm.weight"]
    wrong["model.embed_tokens.weight"] = torch.zeros(44, 16, dtype=torch.bfloat16)
    wrong["model.extra.weight"] = torch.zeros(3)
    wrong["model.steps"] = torch.tensor(0.5)
    write(farm.root / "wrong", wrong)
    request = farm.request(models=(Input(str(farm.root / "wrong"), "w"), Input(str(farm.root / "tuned1"), "a")))
    with pytest.raises(InputError) as caught:
        build_plan(request)
    for part in (
        "w: has no model.layers.0.norm.weight", "vocabulary: 40 against 44", "w: has model.extra.weight",
        "model.steps is",
    ):  # fmt: skip
        assert part in caught.value.message
    with pytest.raises(InputError, match="takes 2 models, 1 are given"):
        build_plan(farm.request(method="slerp", models=(Input(str(farm.root / "tuned1"), "a"),)))
    with pytest.raises(InputError, match="did you mean 'keep'"):
        build_plan(farm.request(method="ties", settings={"kep": 1}))
    twice = (Input(str(farm.root / "tuned1"), "a"), Input(str(farm.root / "tuned2"), "a"))
    with pytest.raises(InputError, match="same name"):
        build_plan(farm.request(models=twice))
    with pytest.raises(InputError, match="no model to fuse"):
        build_plan(farm.request(models=()))
    with pytest.raises(InputError, match="max_shard_size"):
        build_plan(farm.request(max_shard_size="big"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(farm):
    with pytest.raises(InputError, match="device 'cuda' was asked for"):
        build_plan(farm.request("out", device="cuda"))
    assert build_plan(farm.request("out", device="auto")).device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "tsv"])
def test_a_gpu_gives_the_same_values(farm, method):
    on_cpu, on_gpu = fused(farm, "cpu", method=method), fused(farm, "gpu", method=method, device="cuda")
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], value, rtol=1e-2, atol=1e-3)
