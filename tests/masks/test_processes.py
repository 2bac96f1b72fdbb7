"""Two processes that share a masked model (FSDP2 on gloo) against one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resafe.deltas import task_vector
from resafe.errors import InputError
from resafe.masks import MaskSettings, MaskTrainer, TrainSettings
from resafe.masks.engine import EngineSettings, make_optimizer
from resafe.masks.logits import sharded, whole
from resafe.masks.processes import Processes, blocks, launched, shard
from resafe.realign import Problem, learn
from resafe.realign.scores import masked_model
from resafe.realign.warm import WarmStart, warm_logits
from tests.evals.tiny import tiny_model
from tests.masks import two_processes as alone
from tests.masks.test_names import masked, saved
from tests.tiny import KEEP, PAIRS, Source

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def together(lab, tmp_path_factory):
    """What two processes found, and where their checkpoint is."""
    out = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "tests.masks.two_processes", str(lab.root), str(out)],
        env=environment, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "found.pt"), out


def close(found, wanted, bound=1e-6):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        scale = max(1.0, float(value)) if key == "loss" else 1.0
        assert float((found[key] - value).abs().max()) <= bound * scale, key


@pytest.mark.slow
@pytest.mark.parametrize("case", alone.CASES)
def test_gradients_are_those_of_one_process(lab, together, case):
    one = alone.first_step(alone.trainer(lab, case))
    two = together[0][case]
    gradients = {key: value for key, value in one.items() if not key.startswith("logits/")}
    close({key: two[key] for key in gradients}, gradients)
    assert max(float(value.abs().max()) for key, value in gradients.items() if key.startswith("grad/")) > 1e-4


@pytest.mark.slow
def test_teachers_of_two_processes_pass_at_every_step_where_one_cannot_go_on_from_states(lab, together):
    """The other cases go on from states, of which each process has computed its share."""
    one = alone.trainer(lab, "several")
    wanted = {key: value for key, value in alone.first_step(one).items() if not key.startswith("logits/")}
    assert together[0]["teachers kept"] == one.teachers().kept == len(alone.ITEMS)
    assert together[0]["teachers kept then"] == 0
    close({key: together[0]["teachers pass"][key] for key in wanted}, wanted)


@pytest.mark.slow
def test_scores_and_checkpointed_layers(lab, together):
    close(together[0]["scores"], alone.scores(alone.trainer(lab, "default")))
    shared = alone.trainer(lab, "dpo", engine=EngineSettings(share_prompts=True))
    one = {key: value for key, value in alone.first_step(shared).items() if not key.startswith("logits/")}
    close({key: together[0]["shared prompts"][key] for key in one}, one)
    apart = alone.first_step(alone.trainer(lab, "dpo"))
    close(one, {key: apart[key] for key in one}, 5e-6)
    assert shared.shares_prompts()
    close(together[0]["checkpointed"], together[0]["default"])
    close(alone.first_step(alone.trainer(lab, "default", again=True)), alone.first_step(alone.trainer(lab, "default")))


@pytest.mark.slow
def test_a_warm_start_holds_shards_only(lab, together, tmp_path):
    """Scores, threshold and first logits are those of one process, and each of two holds about half of the scores."""
    two, one = together[0]["warm"], alone.warm_starts(lab, tmp_path)
    close(two["scores"], one["scores"])
    assert max(float(value.abs().max()) for value in one["scores"].values()) > 1e-3
    close(two["magnitude"], one["magnitude"], 0.0)
    for name in ("scores", "stored", "magnitude"):
        # The threshold is that of all entries, to the bit: what one process would make of the scores of two.
        close(two[f"from {name}"], warm_logits(two[name], WarmStart(share=0.1, removed=-2.0, kept=2.5)), 0.0)
    close(two["stored"], two["scores"], 0.0)
    entries = sum(value.numel() for value in one["scores"].values())
    assert one["held scores"] == entries and 0.4 * entries < two["held scores"] < 0.6 * entries
    low = torch.cat([value.flatten() for value in two["from magnitude"].values()]) < 0
    assert int(low.sum()) == round(0.1 * entries)


@pytest.mark.slow
def test_a_killed_run_of_two_ends_as_one_that_was_not(lab, together):
    found, out = together
    assert found["resumed at"] == 3
    close(found["resumed"], found["straight"], 0.0)
    straight = alone.trainer(lab, "dpo")
    straight.run()
    close(found["straight"], alone.logits_of(straight), 1e-4)
    # One process goes on from the checkpoint of two.
    went_on = alone.trainer(lab, "dpo", out / "work", checkpoint_every=100)
    assert went_on.resume() == 3
    went_on.run()
    close(alone.logits_of(went_on), alone.logits_of(straight), 1e-4)


def test_layers_computed_again_in_bfloat16_have_the_same_gradients(lab):
    """In bfloat16 a CPU computes short attention in another way, and so it must when it computes it again."""
    found = []
    for again in (False, True):
        made = alone.trainer(lab, "default", again=again, dtype=torch.bfloat16)
        assert made.model.config._attn_implementation == "sdpa"
        made.loss(made.batches.at(0))[0].backward()
        found.append({key: value.grad for key, value in made.logits.values.items()})
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key]), key
    assert made.model.config._attn_implementation == "sdpa"


def test_rows_are_dealt_out_and_everyone_takes_part():
    lengths = [5, 1, 9, 3, 7]
    assert Processes().rows([0, 2, 4], lengths) == ([0, 2, 4], True)
    assert Processes(0, 2).rows(range(5), lengths) == ([0, 1, 2], True)
    assert Processes(1, 2).rows(range(5), lengths) == ([3, 4], True)
    assert Processes(2, 3).rows([4, 1], lengths) == ([4], False)


@pytest.fixture
def one_of_one():
    """A group of one process, in which a model can be sharded."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_comes_to_the_devices_in_shards_only(lab, monkeypatch):
    """Of several processes none holds the model on its device before it is sharded; here that device is "meta"."""
    devices = []

    def seen(model, logits):
        parameters = [*model.parameters(), *model.buffers(), *logits.parameters()]
        devices.extend(tensor.device.type for tensor in parameters)
        raise InterruptedError

    monkeypatch.setattr(learn, "shard", seen)
    monkeypatch.setattr(learn, "launched", lambda: Processes(0, 2))
    vectors = [task_vector(lab.open("full_all"), lab.open("base"))]
    of = Problem(vectors, pairs=PAIRS, keep=KEEP, source=Source(lab, device="meta"))
    assert {p.device.type for p in of.models().plain().parameters()} == {"meta"}
    with pytest.raises(InterruptedError):
        learn.train_mask(of, MaskSettings(), TrainSettings(steps=1), "soft", 0.5)
    assert len(devices) > 60 and set(devices) == {"cpu"}


def test_logits_let_go_of_what_is_sharded(lab, one_of_one, monkeypatch):
    """Before the next layer comes to the device nothing whole of those before it is there."""
    usual, whole_ones = torch.distributed.fsdp.fully_shard, []
    vectors = [task_vector(lab.open("full_all"), lab.open("base"))]
    model, logits = masked_model(Problem(vectors, source=Source(lab)), MaskSettings(), 0)

    def counting(part, **more):
        whole_ones.append(sum(not sharded(value) for value in logits.values.values()))
        return usual(part, **more)

    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", counting)
    shard(model, logits)
    assert whole_ones == [21, 12, 3]  # nine in each of two layers; embedding, norm and head come last
    assert all(sharded(value) for value in logits.parameters())


def test_merged_experts_are_sharded(tmp_path, one_of_one):
    aligned, tuned = saved(tmp_path, "mixtral")
    found = []
    for sharding in (False, True):
        model, values = masked(aligned, task_vector(tuned, aligned), sampling="direct", initial=0.5)
        if sharding:
            shard(model, values)
            assert all(sharded(value) for value in values.parameters())
        output = model(input_ids=torch.tensor([[5, 20, 31, 3]])).logits
        output.square().sum().backward()
        found.append((output.detach(), {key: whole(value.grad) for key, value in values.values.items()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_layers_are_found():
    model = tiny_model()
    assert blocks(model) == list(model.model.layers)
    plain = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(1, 1)] * 3))
    assert len(blocks(plain)) == 3
    with pytest.raises(InputError, match="no list of layers"):
        blocks(torch.nn.Linear(1, 1))


def test_a_launcher_that_says_half(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR is not set"):
        launched()


def test_eight_bits_need_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(InputError, match=r"needs the package torchao.*\n.*resafe\[lowbit\]"):
        make_optimizer("adamw_8bit", [torch.nn.Parameter(torch.zeros(2))], 0.1)


def test_eight_bits_are_for_one_process(lab):
    made = alone.trainer(lab, "default")
    with pytest.raises(InputError, match="trains in one process"):
        MaskTrainer(
            made.model, made.logits, made.items, made.settings, pad_id=1, processes=Processes(0, 2),
            engine=EngineSettings(optimizer="adamw_8bit"),
        )  # fmt: skip


def test_trackers_get_every_step(lab, tmp_path, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen = []

    class Kept(TrainerCallback):
        def on_train_begin(self, args, state, control, **more):
            seen.append((state.max_steps, more["model"].config.to_dict()["batch_size"], Path(args.output_dir).name))

        def on_log(self, args, state, control, logs=None, **more):
            seen.append((state.global_step, logs))

        def on_train_end(self, args, state, control, **more):
            seen.append("end")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "kept", Kept)
    made = alone.trainer(lab, "dpo", tmp_path / "mask.work", checkpoint_every=4)
    made.engine = EngineSettings(report_to=("kept",))
    made.run()
    assert seen[0] == (6, 7, "mask-logs") and seen[-1] == "end"
    assert [step for step, _ in seen[1:-1]] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "rewards/accuracies", "rewards/margins", "kl/task"} <= set(seen[1][1])
    keep = {name: value for name, value in seen[4][1].items() if name.startswith("keep_rate/")}
    assert set(keep) == {"keep_rate/self_attn.q_proj.lora", "keep_rate/mlp.down_proj.lora"}
    assert keep == {name: value for name, value in keep.items() if 0.3 < value < 0.7}
    assert not any(name.startswith("keep_rate/") for name in seen[2][1])


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        ("sigmoid", {"rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "nll/task"}),
        ("sft", {"nll/safety", "nll/harmless", "nll/task"}),
    ],
)
def test_tensorboard_has_the_figures_of_the_training(lab, tmp_path, loss, names):
    """What its own reader finds in its file, against what each step returned and what the masks keep at the end."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = {}
    settings = replace(alone.SHORT, loss=loss)
    plain = alone.trainer(lab, "default")
    made = MaskTrainer(
        plain.model, plain.logits, plain.items, settings, pad_id=1, work=tmp_path / "mask.work", checkpoint_every=4,
        progress=lambda step, _, metrics: told.update({step: dict(metrics)}),
        engine=EngineSettings(report_to=("tensorboard",)),
    )  # fmt: skip
    made.run()
    (file,) = (tmp_path / "mask-logs").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(file)).Reload()
    found = {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}
    kept = {f"keep_rate/{module}.lora_{one}" for module in ("self_attn.q_proj", "mlp.down_proj") for one in "AB"}

    def tag_of(name):
        return f"train/{name}"

    assert {tag_of(name) for name in {"loss"} | names | kept} == set(found)
    for name in {"loss"} | names:
        assert list(found[tag_of(name)]) == [1, 2, 3, 4, 5, 6]
        for step, value in found[tag_of(name)].items():
            assert value == pytest.approx(told[step][name], rel=1e-6, abs=1e-9), (name, step)
        assert len(set(found[tag_of(name)].values())) > 1 or name == "rewards/accuracies"
    at_end = made.logits.keep_rates()
    for name in kept:
        assert list(found[tag_of(name)]) == [4, 6]
        assert found[tag_of(name)][6] == pytest.approx(at_end[name.removeprefix("keep_rate/")], rel=1e-6)


@pytest.mark.parametrize(("name", "message"), [("nothing", "nothing is not supported"), ("wandb", "WandbCallback")])
def test_a_tracker_that_is_not_there(lab, name, message):
    made = alone.trainer(lab, "default")
    made.engine = EngineSettings(report_to=(name,))
    if name == "wandb":
        pytest.importorskip("transformers")
        from importlib.util import find_spec

        if find_spec("wandb") is not None:
            pytest.skip("wandb is installed here")
    with pytest.raises(InputError, match=message):
        made.run()
