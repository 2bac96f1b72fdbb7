"""The fusion engine against plain reading and writing, and against mergekit, on checkpoints that it makes.

TinyLlama-1.1B shapes in bfloat16: a base and three tuned models, 2.2 GB each, random weights. All figures of one call
come from one run on one machine. Times are those of whole processes, the imports included. The table is taken with a
warm page cache (every input is read once before); plain I/O and the two methods that should keep up with it are also
timed after the inputs were dropped from the cache, which is how most fusions find them. Inputs are hashed once and
their digests remembered; the first fusion pays, and stands apart.

    python benchmarks/fusion.py [--json] [--dir DIR] [--rounds 3] [--mergekit PYTHON] [--methods linear,ties,...]

`--mergekit` names the Python of an environment with mergekit 0.1.5; without it the speed-ups are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, VOCABULARY, KV = 2048, 5632, 22, 32000, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "dtype": "bfloat16", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
}  # fmt: skip
DENSITY = 0.2
MEMORY = "1GB"
RESAFE = str(Path(sys.executable).with_name("resafe"))
METHODS = {
    "linear": ("average", {}, {"merge_method": "linear", "parameters": {"normalize": True}}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.4}, {"merge_method": "task_arithmetic"}),
    "ties": (
        "ties", {"keep": DENSITY, "weight": 1.0, "scope": "tensor"},
        {"merge_method": "ties", "parameters": {"normalize": True}},
    ),
    "ties_global": ("ties", {"keep": DENSITY, "weight": 1.0}, None),
    "dare_ties": (
        "dare_ties", {"drop": 1 - DENSITY},
        {"merge_method": "dare_ties", "parameters": {"normalize": False}},
    ),
}  # fmt: skip
"""Key → our method and settings, mergekit's (None: it has no such method; its TIES by tensor stands beside ours)."""
KEEPS_UP = ("linear", "task_arithmetic")
"""Methods that compute so little that they should take about as long as reading and writing alone."""


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensor shapes of TinyLlama-1.1B by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        found |= {
            f"{place}.self_attn.q_proj.weight": (HIDDEN, HIDDEN), f"{place}.self_attn.k_proj.weight": (KV, HIDDEN),
            f"{place}.self_attn.v_proj.weight": (KV, HIDDEN), f"{place}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{place}.mlp.gate_proj.weight": (INNER, HIDDEN), f"{place}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{place}.mlp.down_proj.weight": (HIDDEN, INNER), f"{place}.input_layernorm.weight": (HIDDEN,),
            f"{place}.post_attention_layernorm.weight": (HIDDEN,),
        }  # fmt: skip
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_models(root: Path, count: int) -> list[Path]:
    """The base and `count` tuned models, made once."""
    paths = [root / "base", *(root / f"tuned{k}" for k in range(count))]
    for number, path in enumerate(paths):
        if (path / "config.json").is_file():
            continue
        path.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for index, (name, shape) in enumerate(shapes().items()):
            generator = torch.Generator().manual_seed(index)
            value = torch.empty(shape).normal_(0, 0.02, generator=generator)
            if number:
                value += torch.empty(shape).normal_(0, 0.002, generator=generator.manual_seed(1000 * number + index))
            tensors[name] = value.to(torch.bfloat16)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(CONFIG))
    return paths


def made(root: Path, count: int) -> list[Path]:
    """`make_models` in a process of its own: a child's peak memory starts from what its parent has in memory."""
    process = multiprocessing.get_context("spawn").Process(target=make_models, args=(root, count))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the models could not be made")
    return [root / "base", *(root / f"tuned{k}" for k in range(count))]


def drop_cached(paths: list[Path]) -> None:
    """Has the system forget these files' pages, as far as it does at a process's wish (Linux)."""
    os.sync()  # pages that are not on the disk yet cannot be dropped
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def child(command: list[str], **variables: str) -> tuple[float, float]:
    """Wall seconds and peak resident GB of a command in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)  # the peak of this child alone
        seconds = time.perf_counter() - start
        if status:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read().decode()[-3000:]}")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def ours(root: Path, models: list[Path], key: str, name: str = "out", **fields: object) -> tuple[float, float]:
    """Seconds and peak GB of `resafe fuse`, into a directory of that name, with more fields of the fusion file."""
    method, settings, _ = METHODS[key]
    out = root / name
    shutil.rmtree(out, ignore_errors=True)
    file = root / f"{key}.yaml"
    content = {"base": str(models[0]), "models": list(map(str, models[1:])), "method": method, "settings": settings}
    file.write_text(yaml.safe_dump({**content, "memory": MEMORY, **fields}))
    return child([RESAFE, "fuse", str(file), "--out", str(out), "--quiet"], RESAFE_CACHE=str(root / "cache"))


def peaks_by_models(root: Path, models: list[Path], counts: tuple[int, ...] = (2, 4, 8)) -> dict[int, float]:
    """Peak GB of TIES over the whole model for so many tuned models; links to the same files under other names."""
    found = {}
    for count in counts:
        named = [models[0]]
        for number in range(count):
            place = root / f"link{number}"
            if not place.is_dir():
                shutil.copytree(models[1 + number % (len(models) - 1)], place, copy_function=os.link)
            named.append(place)
        found[count] = ours(root, named, "ties_global")[1]
    return found


def peaks_by_shards(root: Path, models: list[Path]) -> dict[str, float]:
    """Peak GB of TIES over the whole model by the size of output files, and with an input in as many small files."""
    small, large = "100MB", "1GB"
    found = {
        f"output files of {size}": ours(root, models, "ties_global", size, max_shard_size=size)[1]
        for size in (small, large)
    }
    mixed = [*models[:-1], root / small]  # what was just written, beside models of one file each
    return found | {f"one input in files of {small}": ours(root, mixed, "ties_global")[1]}


def theirs(root: Path, models: list[Path], key: str, python: str) -> tuple[float, float]:
    """Seconds and peak GB of mergekit with the same models."""
    out = root / "out-mergekit"
    shutil.rmtree(out, ignore_errors=True)
    options = METHODS[key][2]
    assert options is not None
    tuned = [{"model": str(path), "parameters": {"weight": 1.0, "density": DENSITY}} for path in models[1:]]
    content = {**options, "models": tuned, "dtype": "float32", "out_dtype": "bfloat16"}
    if key != "linear":
        content["base_model"] = str(models[0])
    file = root / f"{key}.mergekit.yaml"
    file.write_text(yaml.safe_dump(content))
    command = [str(Path(python).with_name("mergekit-yaml")), str(file), str(out), "--no-copy-tokenizer"]
    return child([*command, "--async-write", "--quiet", "--out-shard-size", "5B"])


def plain_io(root: Path, models: list[Path]) -> float:
    """Seconds to read all the models and to write one, sequentially, in blocks of 16 MiB."""
    buffer = memoryview(bytearray(16 << 20))
    start = time.perf_counter()
    with (root / "plain.bin").open("wb", buffering=0) as written:
        for number, path in enumerate(models):
            with (path / "model.safetensors").open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    if number == len(models) - 1:
                        written.write(buffer[:count])
        os.fsync(written.fileno())
    return time.perf_counter() - start


def from_disk(root: Path, models: list[Path], inputs: list[Path], key: str) -> tuple[float, float]:
    """Seconds of `resafe fuse` and of plain I/O, both after the models were dropped from the page cache."""
    files = [path / "model.safetensors" for path in models]
    drop_cached(files)
    plain = plain_io(root, inputs)
    drop_cached(files)
    return ours(root, models, key)[0], plain


def overhead(root: Path, counts: tuple[int, ...] = (5_000, 20_000, 50_000)) -> dict[int, float]:
    """Seconds to plan and fuse so many tensors of 16 entries: what a header with that many costs."""
    found = {}
    for count in counts:
        place = root / f"small{count}"
        for name in ("base", "tuned"):
            if not (place / name / "config.json").is_file():
                (place / name).mkdir(parents=True, exist_ok=True)
                values = torch.randn(count, 4, 4).to(torch.bfloat16)
                tensors = {
                    f"model.layers.{i // 512}.experts.{i % 512}.w.weight": values[i].clone() for i in range(count)
                }
                save_file(tensors, place / name / "model.safetensors", metadata={"format": "pt"})
                (place / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        file = place / "fuse.yaml"
        file.write_text(yaml.safe_dump({"base": str(place / "base"), "models": [str(place / "tuned")]}))
        shutil.rmtree(place / "out", ignore_errors=True)
        command = [RESAFE, "fuse", str(file), "--out", str(place / "out"), "--quiet"]
        found[count] = child(command, RESAFE_CACHE=str(root / "cache"))[0]
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "resafe-bench-fusion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--models", type=int, default=3)
    given = parser.parse_args()
    models = made(given.dir, given.models)
    plain_io(given.dir, models)  # warms the page cache
    shutil.rmtree(given.dir / "cache", ignore_errors=True)
    first, _ = ours(given.dir, models, "task_arithmetic")
    print(f"task_arithmetic, inputs hashed for the first time: {first:.1f} s")
    figures: dict[str, float] = {}
    columns = (
        ("resafe s", 9),
        ("GB", 5),
        ("plain I/O s", 12),
        ("ratio", 6),
        ("mergekit s", 11),
        ("GB", 5),
        ("speed-up", 9),
    )
    print(f"{'method':16} " + " ".join(f"{title:>{width}}" for title, width in columns))
    peaks, other_peaks, dropped, measured = [], [], list[str](), dict[str, tuple[float, float]]()
    for key in given.methods.split(","):
        inputs = models[1:] if key == "linear" else models
        mine, plain, cold = [], [], []
        for _ in range(given.rounds):
            plain.append(plain_io(given.dir, inputs))
            mine.append(ours(given.dir, models, key))
            if key in KEEPS_UP:
                cold.append(from_disk(given.dir, models, inputs, key))
        seconds, peak, io = statistics.median(s for s, _ in mine), max(p for _, p in mine), statistics.median(plain)
        peaks.append(peak)
        line = f"{key:16} {seconds:9.1f} {peak:5.2f} {io:12.1f} {seconds / io:6.2f}"
        if key in KEEPS_UP:
            figures[f"io_ratio_{key}"] = statistics.median(seconds / plain for seconds, plain in cold)
            figures[f"io_ratio_{key}_warm"] = statistics.median(s / p for (s, _), p in zip(mine, plain, strict=True))
            fused, plain_s = (statistics.median(column) for column in zip(*cold, strict=True))
            dropped.append(f"{key:16} {fused:9.1f} {'':5} {plain_s:12.1f} {figures[f'io_ratio_{key}']:6.2f}")
        if given.mergekit:
            asked = "ties" if METHODS[key][2] is None else key
            if asked not in measured:
                measured[asked] = theirs(given.dir, models, asked, given.mergekit)
            other, other_peak = measured[asked]
            figures[f"speedup_{key}"] = other / seconds
            other_peaks.append(other_peak)
            line += f" {other:11.1f} {other_peak:5.2f} {other / seconds:9.1f}"
        print(line, flush=True)
        if key == "task_arithmetic":
            rate = sum(map(size, inputs)) * 1.25 / seconds  # inputs read, and one output written
            shown = ", ".join(f"{n}B {5 * 2e9 * n / rate / 60:.0f} min" for n in (8, 70, 405))
            projected = f"at this rate ({rate / 1e9:.2f} GB/s moved), base + 3 in bfloat16: {shown}"
    print("\n".join(["after the inputs were dropped from the page cache:", *dropped]) if dropped else "")
    if other_peaks:
        figures["peak_ratio"] = max(a / b for a, b in zip(peaks, other_peaks, strict=True))
    for count, peak in peaks_by_models(given.dir, models).items():
        peaks.append(peak)
        print(f"peak with {count} models, TIES over the whole model, memory {MEMORY}: {peak:.2f} GB")
    for files, peak in peaks_by_shards(given.dir, models).items():
        peaks.append(peak)
        print(f"peak with {files}, TIES over the whole model, memory {MEMORY}: {peak:.2f} GB")
    small = overhead(given.dir)
    figures["overhead_50k_s"] = small[50_000]
    figures["peak_gb"] = max(peaks)
    print("small tensors: " + ", ".join(f"{n:,} in {s:.1f} s" for n, s in small.items()))
    if "task_arithmetic" in given.methods:
        print(projected)
    print(f"page cache warm but where said; {os.cpu_count()} cores; torch {torch.__version__}")
    if given.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def size(path: Path) -> int:
    """Bytes of a model's weights."""
    return (path / "model.safetensors").stat().st_size


if __name__ == "__main__":
    main()
