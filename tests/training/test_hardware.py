"""What needs a GPU, as far as it can be tried without one: the 4-bit base that is asked for, accelerate's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from resafe.checkpoints import open_checkpoint
from resafe.training import LoraSettings, SftSettings, start, train_sft
from resafe.training.adapters import with_trainable

from .conftest import make_model, make_tokenizer

FILES = Path(__file__).parents[2] / "recipes" / "accelerate"
FSDP_ON_CPU = Path(__file__).with_name("fsdp_on_cpu.py")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What transformers is asked to load; a plain model stands for the quantised one."""
    import transformers

    seen: dict[str, Any] = {}

    def load(path: Any, **settings: Any) -> Any:
        seen.update(settings, path=Path(path))
        return make_model()

    monkeypatch.setattr(start, "check_four_bit", lambda device, full: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    return seen


def test_a_four_bit_base_is_asked_for_as_in_qlora(base: str, asked: dict[str, Any]) -> None:
    model = start.start_model(open_checkpoint(base), full=False, device="cuda", four_bit=True)
    config = asked["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert asked["path"] == Path(base) and asked["device_map"] == {"": 0}
    assert (asked["local_files_only"], asked["trust_remote_code"]) == (True, False)
    assert not any(weight.requires_grad for weight in model.parameters())  # frozen, until the adapter is put on
    trained = with_trainable(model, LoraSettings(rank=4), 0)
    names = [name for name, weight in trained.named_parameters() if weight.requires_grad]
    assert names and all("lora_" in name for name in names)


def test_an_adapter_is_continued_over_a_four_bit_base(base: str, tmp_path: Path, asked: dict[str, Any]) -> None:
    from .test_sft import EXAMPLES

    settings = SftSettings(steps=1, batch_size=2, device="cpu")
    made = train_sft(
        model=make_model(), tokenizer=make_tokenizer(), examples=EXAMPLES, settings=settings, out=tmp_path / "a",
        system="", lora=LoraSettings(rank=4),
    )  # fmt: skip
    opened = open_checkpoint(f"{base}+{made.path}")
    model = start.start_model(opened, full=False, device="cuda", four_bit=True)
    assert asked["path"] == Path(base)
    trained = with_trainable(model, None, 0)
    kept = {name: weight for name, weight in trained.named_parameters() if weight.requires_grad}
    before = dict(made.model.named_parameters())
    assert kept and all("lora_" in name for name in kept)
    assert all(torch.equal(weight, before[name]) for name, weight in kept.items())


def launched(file: str) -> tuple[Any, dict[str, str]]:
    """The arguments that `accelerate launch` makes of a file, by its own parser and checks, and its environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = launch_command_parser().parse_args(["--config_file", str(FILES / file), "-m", "resafe", "tune"])
    arguments, _, _ = _validate_launch_command(given)
    kept = dict(os.environ)
    try:
        return arguments, prepare_multi_gpu_env(arguments)
    finally:
        os.environ.clear()
        os.environ.update(kept)


def test_accelerate_takes_the_fsdp2_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FSDPModule  # noqa: F401  # the second version is there
    from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

    arguments, environment = launched("fsdp2.yaml")
    assert (arguments.use_fsdp, arguments.use_cpu, arguments.num_processes) == (True, False, 2)
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT  # one process writes the whole model
    assert not plugin.activation_checkpointing  # `gradient_checkpointing` decides
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # none, in FSDP2's words
    assert not plugin.cpu_ram_efficient_loading
    plugin.set_auto_wrap_policy(make_model())  # finds the model's layers
    assert plugin.auto_wrap_policy is not None
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.slow
def test_fsdp2_over_two_cpu_processes_gives_the_weights_of_one(base: str, tmp_path: Path) -> None:
    """All weights, sharded and gathered by accelerate as its file says (but for bfloat16), saved on the way."""
    rows = [{"instruction": f"Say {n}", "output": f"Here: {n}"} for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"steps": 4, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0,
                "save_every": 2}  # fmt: skip
    common = [
        "tune", base, str(tmp_path / "mine.jsonl"), "--full", "--device", "cpu", "--dtype", "float32", "--system", "",
        "--quiet", "--json", *(f"--set={name}={value}" for name, value in settings.items()),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(FILES.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    _, given = launched("fsdp2.yaml")
    fsdp = {name: value for name, value in given.items() if name.startswith("FSDP_")}
    fsdp |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FSDP_ON_CPU)]
    for name, start_with, more in (("one", ["-m", "resafe"], {}), ("two", two, fsdp)):
        command = [sys.executable, *start_with, *common, "--out", str(tmp_path / name)]
        done = subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()  # a tied output layer is written once
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-6
    losses = [json.loads((tmp_path / name / "training.json").read_text())["losses"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_accelerate_takes_the_file_for_cpus() -> None:
    arguments, _ = launched("ddp-cpu.yaml")
    assert (arguments.use_cpu, arguments.num_processes, arguments.use_fsdp) == (True, 2, False)
