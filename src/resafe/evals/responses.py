"""Responses kept on disk, one line each as they come, so that judging again never generates again.

A response is found by what it depends on: the model's digest, the text the model read (system turn, wrapper and chat
template in it) and the decoding. Knows no judge and no question. Endpoints have no digest: Inspect's own cache keeps
their responses.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import InputError
from resafe.evals.llm.cache import ReplyCache
from resafe.provenance import digest_value

if TYPE_CHECKING:
    from resafe.checkpoints import Checkpoint

FORMAT = 1
"""Raised when the decoding of the same prompt by the same model changes."""


@dataclass(frozen=True)
class Decoding:
    """What a response depends on besides model and text.

    Attributes:
        max_new_tokens: Most tokens.
        dtype: Precision of the weights in memory, such as "float32".
        temperature: 0 is greedy; then the rest is left out of the key.
        top_k, top_p, seed: As in `Sampling`.
    """

    max_new_tokens: int
    dtype: str
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def facts(self) -> Mapping[str, Any]:
        """What the key is made of."""
        drawn = [self.temperature, self.top_k, self.top_p, self.seed] if self.temperature else []
        return {"format": FORMAT, "tokens": self.max_new_tokens, "dtype": self.dtype, "drawn": drawn}


_SPOKEN = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def speaker_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of all that decides what a checkpoint answers to a text: its weights, its tokenizer, where it stops."""
    folders = [one.path for one in (checkpoint, checkpoint.base) if one is not None and one.path.is_dir()]
    files = [folder / name for folder in folders for name in _SPOKEN]
    said = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files if file.is_file()]
    return digest_value([checkpoint.digest, said])


class ResponseStore:
    """The stored responses of one model: an append-only file in a directory, named by the model's digest.

    A line is on its way to the disk, by one system call, before the next token is decoded: `kill -9` loses the rows
    that were being decoded and no other. A line that it tore is overlooked, and its response made again.

    Args:
        root: Directory of all models' files; made if missing.
        model: The model's digest.

    Raises:
        InputError: Another process is writing this model's responses.
    """

    def __init__(self, root: Path, model: str) -> None:
        self.model = model
        self.path = root / f"{model[:32]}.jsonl"
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(root / f".{model[:32]}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise InputError(f"{root}: cannot be written ({error.strerror})", "give another --store") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise InputError(
                f"{self.path}: another process is answering with this model", "wait for it, or give another --store"
            ) from None
        self._rows = ReplyCache(self.path)

    def key(self, text: str, decoding: Decoding) -> str:
        """The key of the answer to a rendered text."""
        return digest_value([self.model, text, decoding.facts()])

    def get(self, key: str) -> str | None:
        """The stored response, or None."""
        row = self._rows.get(key)
        response = row.get("response") if row else None
        return response if isinstance(response, str) else None

    def put(self, key: str, response: str) -> None:
        """Stores a response; a second one for the same key is dropped."""
        self._rows.put(key, {"response": response})

    def close(self) -> None:
        """Writes all to the disk and lets other processes write."""
        self._rows.close()
        os.close(self._lock)

    def __enter__(self) -> ResponseStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
