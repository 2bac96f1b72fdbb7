"""A repository of the Hub read by ranges, against a server on this machine that answers as the Hub does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch

from resafe.checkpoints import RemoteFile, open_checkpoint, parse_output
from resafe.checkpoints.hub import hub_files
from resafe.engine import Input, Request, build_plan, execute
from resafe.errors import InputError, ResafeError

pytest.importorskip("obstore")
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Listing, files, and weights behind a redirect to another address, as the Hub gives them; notes what is asked."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, list[tuple[str, str | None]]()
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        place, wanted = self.path.partition("?")[0], self.headers.get("Range")
        self.server.asked.append((place, wanted))
        listing = re.fullmatch(r"/api/models/(org/\w+)(?:/revision/(\w+))?", place)
        file = re.fullmatch(rf"/(org/\w+)/resolve/{SHA}/([\w.-]+)", place)
        if listing and (self.server.root / listing[1]).is_dir() and listing[2] in (None, "main", SHA):
            files = sorted((self.server.root / listing[1]).iterdir())
            found = [{"rfilename": f.name, "size": f.stat().st_size, "blobId": f"b-{f.name}"} for f in files]
            self._send(200, json.dumps({"id": listing[1], "sha": SHA, "siblings": found}).encode())
        elif listing:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
        elif file and file[2].endswith(".safetensors"):
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/cdn/{file[1]}/{file[2]}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif file or place.startswith("/cdn/"):
            path = self.server.root / (place.removeprefix("/cdn/") if not file else f"{file[1]}/{file[2]}")
            content = path.read_bytes()
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
            if span is None:
                self._send(200, content)
            else:
                start, stop = int(span[1]), int(span[2]) + 1
                self._send(206, content[start:stop], f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self._send(404, b"")

    def _send(self, status: int, content: bytes, span: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    running = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    thread = Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def models(hub: Hub) -> Path:
    """A base and a tuned model in the Hub's repositories org/base and org/tuned."""
    from tests.engine.conftest import tensors, write

    write(hub.root / "org" / "base", tensors(0), shards=2)
    write(hub.root / "org" / "tuned", {k: v + 1 if v.is_floating_point() else v for k, v in tensors(0).items()})
    return hub.root


def test_a_fusion_reads_ranges_and_gives_the_bits_of_disks(hub: Hub, models: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for out, base, tuned in (
        ("local", str(models / "org/base"), str(models / "org/tuned")),
        ("remote", "hf://org/base", "hf://org/tuned@main"),
    ):
        request = Request(base, (Input(tuned, "one"),), tmp_path / out, "ties", {"keep": 0.5})
        assert execute(build_plan(request, cache), threads=2).committed
    files = sorted(path.name for path in (tmp_path / "local").glob("*.safetensors"))
    assert len(files) == 2
    assert all((tmp_path / "local" / f).read_bytes() == (tmp_path / "remote" / f).read_bytes() for f in files)
    weights = [span for place, span in hub.asked if place.startswith("/cdn/")]
    assert weights and all(weights)  # nothing was asked for without a range
    assert not list(cache.rglob("*.safetensors"))
    receipts = json.loads((tmp_path / "remote" / "resafe-receipts.json").read_text())
    assert f"hf://org/base@{SHA}/model-00001-of-00002.safetensors" in json.dumps(receipts)


def test_a_tensor_is_read_from_its_place(hub: Hub, models: Path, tmp_path: Path) -> None:
    opened = open_checkpoint("hf://org/tuned", cache=tmp_path / "cache")
    assert all(isinstance(file, RemoteFile) for file in opened.files)
    name = "model.layers.0.self_attn.q_proj.weight"
    local = open_checkpoint(models / "org" / "tuned", cache=tmp_path / "cache")
    before = len(hub.asked)
    assert torch.equal(opened.read(name), local.read(name))
    asked = [span or "" for place, span in hub.asked[before:] if place.startswith("/cdn/")]
    assert len(asked) == 1 and asked[0].startswith(f"bytes={opened.tensors[name].offset}-")


def test_the_token_goes_along(hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret-word")
    seen = []
    answer = Answer.do_GET

    def noted(self: Answer) -> None:
        seen.append((self.path, self.headers.get("Authorization")))
        answer(self)

    monkeypatch.setattr(Answer, "do_GET", noted)
    file = hub_files("hf://org/tuned")["config.json"]
    assert json.loads(bytes(file.fetch(0, file.size))) == {"model_type": "llama"}
    assert seen[-1][0].endswith("/config.json") and seen[-1][1] == "Bearer secret-word"
    assert "secret-word" not in repr(file) + json.dumps(file.state)


def test_what_cannot_be_read_is_said(hub: Hub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="hf://org/none: cannot be read from the Hub"):
        open_checkpoint("hf://org/none", cache=tmp_path)
    with pytest.raises(InputError, match="the Hub is only read"):
        parse_output("hf://org/out")
    opened = open_checkpoint("hf://org/tuned", cache=tmp_path / "cache")
    (models / "org" / "tuned" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ResafeError, match="model.safetensors"):
        opened.read("model.steps")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set") as caught:
        open_checkpoint("hf://org/tuned", cache=tmp_path)
    assert "give org/tuned" in str(caught.value)
