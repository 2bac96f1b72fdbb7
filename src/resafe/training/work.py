"""The working directory of a training run: which checkpoint to go on from. Knows files, no tensors but to digest them.

`out` appears at once, complete, when training is done; until then everything lies in `out.work`, whose `run.json`
says which run it belongs to. A run with other settings, data or weights starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resafe.errors import InputError
from resafe.provenance import digest_value

TOKENS = ("tokens.arrow", "tokens.json")
"""Files in a working directory that belong to no run: the table of a stream, written before the run is known."""

_HEAD_BYTES = 4096


def processes() -> Any:
    """The processes of this run (accelerate's state): one, or those that `accelerate launch` started."""
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]

    return PartialState(cpu=not torch.cuda.is_available())


def work_directory(out: Path) -> Path:
    """Where a run that writes `out` keeps its checkpoints."""
    return out.with_name(out.name + ".work")


def weights_digest(model: Any) -> str:
    """SHA-256 over the trainable parameters and the first 4 KiB of each frozen one, with names, shapes and dtypes.

    Enough to tell one start from another without reading gigabytes of frozen weights.
    """
    import torch

    hasher = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        hasher.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad};".encode())
        values = parameter.detach().reshape(-1)
        if not parameter.requires_grad:
            values = values[: _HEAD_BYTES // parameter.element_size()]
        hasher.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def run_identity(kind: str, model: Any, settings: Any, content: str) -> str:
    """Digest of everything that a run's result depends on: kind, start weights, settings, digest of the tokens."""
    chosen = {key: value for key, value in asdict(settings).items() if key not in ("device", "save_every", "report_to")}
    return digest_value([kind, weights_digest(model), chosen, content])


def checked_work_directory(out: Path) -> Path:
    """`work_directory`, after a look whether what lies there is a run's.

    Raises:
        InputError: It holds something else, which a run would remove; or `out` is not ours to write.
    """
    from resafe.checkpoints.staging import check_replaceable

    check_replaceable(Path(os.path.realpath(out)))  # now, and not when training is done
    work = work_directory(out)
    check_replaceable(work)
    return work


def last_checkpoint(work: Path, identity: str) -> Path | None:
    """The newest complete checkpoint of this run; removes what another run left.

    A checkpoint is complete if its `trainer_state.json`, which is written last, can be read.
    """
    record = work / "run.json"
    try:
        known = json.loads(record.read_text())["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        make_work(work)
        _empty(work, keep=TOKENS)
        record.write_text(json.dumps({"identity": identity}))
        return None
    complete = [path for path in work.glob("checkpoint-*") if _is_complete(path)]
    broken = [path for path in work.glob("checkpoint-*") if path not in complete]
    for path in broken:
        shutil.rmtree(path)
    return max(complete, key=_step, default=None)


def make_work(work: Path) -> None:
    """Makes the directory, with the mark of what is ours to remove in it first of all.

    Raises:
        InputError: It cannot be made.
    """
    from resafe.checkpoints.staging import mark

    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{work} cannot be made: {error.strerror}", "give another output directory") from None
    mark(work)


def remove_work(work: Path) -> None:
    """Removes all of it, the mark last: a kill in between leaves something that a next run may remove."""
    _empty(work, keep=())
    shutil.rmtree(work)


def _empty(work: Path, keep: tuple[str, ...]) -> None:
    from resafe.checkpoints.staging import MARKER

    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (MARKER, *keep):
            path.unlink(missing_ok=True)


def _step(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def _is_complete(path: Path) -> bool:
    try:
        state = json.loads((path / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(state.get("global_step") == _step(path))
