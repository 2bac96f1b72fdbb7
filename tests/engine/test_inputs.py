"""Inputs of other formats and habits: FP8 with scales, tied heads, recomputed buffers, pickles."""

from __future__ import annotations

import pytest
import torch

from resafe.checkpoints import open_checkpoint
from resafe.engine import Input, Request, build_plan, execute
from resafe.engine.estimate import estimate, fit_threads, needed_memory
from resafe.errors import InputError

from .conftest import Farm, write


def fuse(root, models, **changes):
    request = Request(str(root / "base"), tuple(Input(str(root / m), m) for m in models), root / "out", **changes)
    plan = build_plan(request)
    assert execute(plan, threads=1).committed
    return open_checkpoint(root / "out"), plan


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("blocks", [(), (6, 1), (3, 2)], ids=["tensor", "row", "block"])
def test_fp8_is_unpacked_with_its_scales(tmp_path, suffix, blocks):
    torch.manual_seed(0)
    base = {"w.weight": torch.randn(6, 8).to(torch.bfloat16)}
    packed, scale = torch.randn(6, 8).to(torch.float8_e4m3fn), torch.rand(blocks) + 0.5
    write(tmp_path / "base", base)
    write(tmp_path / "packed", {"w.weight": packed, f"w.weight{suffix}": scale})
    down, across = (6 // blocks[0], 8 // blocks[1]) if blocks else (6, 8)
    spread = scale.reshape(blocks or (1, 1)).repeat_interleave(down, 0).repeat_interleave(across, 1)
    found, _ = fuse(tmp_path, ["packed"], dtype="float32")
    torch.testing.assert_close(found.read("w.weight"), packed.float() * spread, rtol=1e-6, atol=1e-6)


def test_an_fp8_base_is_written_unpacked(tmp_path):
    packed, scale = torch.randn(4, 8).to(torch.float8_e4m3fn), torch.tensor(0.5)
    write(tmp_path / "base", {"w.weight": packed, "w.weight_scale": scale, "n.weight": torch.ones(3)})
    write(tmp_path / "tuned", {"w.weight": (packed.float() + 1).bfloat16(), "n.weight": torch.zeros(3)})
    found, _ = fuse(tmp_path, ["tuned"])
    assert set(found.tensors) == {"w.weight", "n.weight"}
    assert found.tensors["w.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(found.read("w.weight"), (packed.float() + 1).bfloat16(), rtol=2**-7, atol=2**-7)


def test_a_tied_head_stands_for_the_one_that_the_base_stores(tmp_path):
    embedding, head = torch.randn(10, 4), torch.randn(10, 4)
    write(tmp_path / "base", {"model.embed_tokens.weight": embedding, "lm_head.weight": head})
    tuned = torch.randn(10, 4)
    write(tmp_path / "tied", {"model.embed_tokens.weight": tuned}, config={"tie_word_embeddings": True})
    found, plan = fuse(tmp_path, ["tied"])
    torch.testing.assert_close(found.read("lm_head.weight"), tuned, rtol=1e-5, atol=1e-6)
    assert any("is tied to" in note for note in plan.notes)


def test_a_head_that_the_base_ties_is_refused(tmp_path):
    embedding = torch.randn(10, 4)
    write(tmp_path / "base", {"model.embed_tokens.weight": embedding}, config={"tie_word_embeddings": True})
    write(tmp_path / "untied", {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1})
    with pytest.raises(InputError, match="untie the base first"):
        fuse(tmp_path, ["untied"])


def test_recomputed_buffers_are_left_out_and_said(tmp_path):
    write(tmp_path / "base", {"w": torch.ones(4)})
    write(tmp_path / "old", {"w": torch.zeros(4), "model.layers.0.rotary_emb.inv_freq": torch.ones(2)})
    found, plan = fuse(tmp_path, ["old"])
    assert list(found.tensors) == ["w"]
    assert any("inv_freq is left out" in note for note in plan.notes)


def test_pickled_weights_only_when_allowed(tmp_path):
    write(tmp_path / "base", {"w": torch.ones(3, 4)})
    (tmp_path / "old").mkdir()
    torch.save({"w": torch.full((3, 4), 3.0)}, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="pickle"):
        fuse(tmp_path, ["old"])
    found, _ = fuse(tmp_path, ["old"], allow_pickle=True)
    assert found.read("w").tolist() == torch.full((3, 4), 3.0).tolist()


def test_estimates_count_every_byte(farm: Farm):
    plan = build_plan(farm.request(method="ties"))
    cost = estimate(plan, 2)
    size = sum(info.nbytes for info in open_checkpoint(farm.root / "base").tensors.values())
    integer = 8  # model.steps: copied, and read once
    assert cost.bytes_read == 3 * 3 * (size - integer) + integer  # three models, three passes
    assert cost.bytes_written == sum(unit.nbytes for unit in plan.units) > size
    assert cost.seconds > 0 and cost.read_rate > 0


def test_memory_limits_the_threads_or_is_refused(farm: Farm):
    plan = build_plan(farm.request(method="ties", memory="1GB"))
    assert fit_threads(plan, 2) == 2
    one = needed_memory(plan, 1)
    assert fit_threads(build_plan(farm.request(method="ties", memory=one)), 8) == 1
    with pytest.raises(InputError, match="needs .* for the largest tensor"):
        fit_threads(build_plan(farm.request(method="ties", memory=one - 1)), 2)
