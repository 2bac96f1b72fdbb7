"""`resafe eval utility` against the `lm_eval` command line: COPA, XCOPA-zh and 200 rows of XNLI-hi, whole commands.

Both sides get the same checkpoint, the same local rows and float32; lm_eval gets the batch size of several that was
fastest on a part of the rows. Prints utility_speed_ratio (seconds of lm_eval over ours) and
utility_accuracy_difference (the largest difference of an accuracy, 0 for equal to the last digit).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from common import MODEL

from resafe.checkpoints import load_tokenizer, open_checkpoint
from resafe.evals.utility.names import TASKS, local_file

DATA = Path(os.environ.get("RESAFE_DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")
ROWS = {"copa": 100, "xcopa_zh": 500, "xnli_hi": 200}
BATCHES = (1, 8, 32)
PART = 12  # items a task when batch sizes are compared


def write_definitions(root: Path, rows: dict[str, int]) -> None:
    """lm-eval's own definitions, pointed at files that hold just the rows to measure."""
    import lm_eval.tasks

    tasks = Path(lm_eval.tasks.__file__).parent
    for name, count in rows.items():
        task = TASKS[name]
        split = "test" if "test" in task.files else "validation"
        lines = local_file(DATA, name, split).read_text("utf-8").split("\n")
        found = [json.loads(line) for line in lines if line.strip()][:count]
        for row in found:
            if task.labels:
                row["label"] = task.labels.index(row["label"])
        rows_file = root / f"{name}.jsonl"
        rows_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "utf-8")
        definition = {
            "include": str(tasks / task.yaml), "task": f"local_{name}", "tag": None,
            "dataset_path": "json", "dataset_name": None, "training_split": None, "validation_split": None,
            "dataset_kwargs": {"data_files": {split: str(rows_file)}}, f"{split}_split": split,
        }  # fmt: skip
        (root / f"{name}.yaml").write_text(yaml.safe_dump(definition, allow_unicode=True), "utf-8")


def run(command: Sequence[str], lock: Path | None) -> tuple[str, float]:
    """Standard output and seconds of a command, alone on the machine where a lock is given."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with _held(lock):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout, seconds


@contextmanager
def _held(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lm_eval(model: Path, root: Path, rows: dict[str, int], batch: int, limit: int | None, lock: Path | None) -> tuple[
    dict[str, float], float
]:  # fmt: skip
    """Accuracies and seconds of the `lm_eval` command."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf",
            "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", str(batch),
            "--tasks", ",".join(f"local_{name}" for name in rows), "--include_path", str(root),
            "--output_path", out, *(["--limit", str(limit)] if limit else []),
        ]  # fmt: skip
        _, seconds = run(command, lock)
        found = json.loads(next(Path(out).rglob("results*.json")).read_text("utf-8"))["results"]
    return {name: found[f"local_{name}"]["acc,none"] for name in rows}, seconds


def ours(model: Path, rows: dict[str, int], lock: Path | None) -> tuple[dict[str, float], float]:
    """Accuracies and seconds of `resafe eval utility`."""
    limits = [part for name, count in rows.items() for part in ("--limit", f"{name}={count}")]
    command = [
        sys.executable, "-m", "resafe", "eval", "utility", f"base={model}", "--tasks", ",".join(rows),
        "--data-dir", str(DATA), *limits, "--device", "cpu", "--dtype", "float32", "--json", "--quiet",
    ]  # fmt: skip
    text, seconds = run(command, lock)
    scores = json.loads(text.strip().splitlines()[-1])["models"][0]["scores"]
    return {score["task"]: score["value"] for score in scores if score["metric"] == "acc"}, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--share", type=float, default=1.0, help="part of the rows, for a quick look")
    parser.add_argument("--rounds", type=int, default=1, help="times that both commands run, in turn")
    parser.add_argument("--batch", type=int, action="append", help="batch sizes of lm_eval to choose from")
    parser.add_argument("--lock", type=Path, help="file to lock while a command is timed")
    options = parser.parse_args()
    rows = {name: max(1, int(count * options.share)) for name, count in ROWS.items()}
    checkpoint = open_checkpoint(MODEL)
    load_tokenizer(checkpoint)
    seconds: dict[str, list[float]] = {"ours": [], "lm_eval": []}
    differences = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_definitions(root, rows)
        choices = options.batch or list(BATCHES)
        trials = {b: lm_eval(checkpoint.path, root, rows, b, PART, options.lock)[1] for b in choices}
        best = min(trials, key=lambda batch: trials[batch])
        for _ in range(options.rounds):
            mine, mine_seconds = ours(checkpoint.path, rows, options.lock)
            theirs, their_seconds = lm_eval(checkpoint.path, root, rows, best, None, options.lock)
            seconds["ours"].append(mine_seconds)
            seconds["lm_eval"].append(their_seconds)
            differences.append(max(abs(mine[name] - theirs[name]) for name in rows))
    result = {
        "utility_speed_ratio": min(seconds["lm_eval"]) / min(seconds["ours"]),
        "utility_accuracy_difference": max(differences),
        "seconds": seconds, "lm_eval_batch_size": best, "batch_trials": trials, "rows": rows,
        "accuracy": mine, "lm_eval_accuracy": theirs, "cores": os.cpu_count(),
    }  # fmt: skip
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name, value in result.items():
        sys.stdout.write(f"{name:28} {value}\n")


if __name__ == "__main__":
    main()
