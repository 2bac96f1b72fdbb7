"""Object storage, against an S3 server on this machine: the bits that disks give, and no more bytes than are needed."""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import resafe
from resafe.checkpoints import RemoteFile, blocks, load_model, open_checkpoint, open_prefix, read_header
from resafe.checkpoints.storage import Prefix
from resafe.engine import Input, build_plan, execute, verify
from resafe.engine.estimate import fit_threads, needed_memory
from resafe.errors import InputError, ResafeError

from .conftest import Farm, write
from .test_adapters import make

pytest.importorskip("obstore")
moto = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    yield f"http://127.0.0.1:{running.get_host_and_port()[1]}"
    running.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The address of a new bucket; the environment that obstore reads, and a cache of its own."""
    import boto3

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": server, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "user",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1", "RESAFE_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    name = f"b{abs(hash(request.node.nodeid)):x}"
    boto3.client("s3", endpoint_url=server, region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"


def send(directory: Path, url: str) -> str:
    for path in directory.iterdir():
        open_prefix(url).put(path.name, path)
    return url


class Counted:
    """Every range that is fetched, by file name and place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: Counter[tuple[str, int, int]] = Counter()
        fetch = RemoteFile.fetch

        def counted(file: RemoteFile, start: int, stop: int) -> memoryview:
            self.ranges[file.url, start, stop] += 1
            return fetch(file, start, stop)

        monkeypatch.setattr(RemoteFile, "fetch", counted)

    def nbytes(self, part: str = "") -> int:
        """Bytes of all ranges of files whose address has `part` in it."""
        return sum((stop - start) * n for (url, start, stop), n in self.ranges.items() if part in url)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


class RemoteFarm:
    """A farm whose checkpoints also lie in a bucket."""

    def __init__(self, farm: Farm, bucket: str) -> None:
        self.farm, self.bucket = farm, bucket
        for name in ("base", "tuned1", "tuned2"):
            send(farm.root / name, f"{bucket}/{name}")

    def request(self, out: str = "out", **changes):
        models = tuple(Input(f"{self.bucket}/tuned{k}", name) for k, name in ((1, "a"), (2, "b")))
        request = self.farm.request(base=f"{self.bucket}/base", **{"models": models, **changes})
        return replace(request, out=f"{self.bucket}/{out}")

    def shards(self, out: str = "out") -> dict[str, bytes]:
        prefix = open_prefix(f"{self.bucket}/{out}")
        return {name: prefix.read(name) for name in prefix.files() if ".safetensors" in name}


@pytest.fixture
def remote(farm: Farm, bucket: str) -> RemoteFarm:
    return RemoteFarm(farm, bucket)


def local(farm: Farm, out: str, **changes) -> dict[str, bytes]:
    execute(build_plan(farm.request(out, **changes)), threads=1)
    return {path.name: path.read_bytes() for path in (farm.root / out).glob("*.safetensors*")}


@pytest.mark.parametrize("method", ["ties", "dare_ties", "average"])
def test_from_bucket_to_bucket_the_bits_are_those_of_disks(remote: RemoteFarm, method: str) -> None:
    wanted = local(remote.farm, "there", method=method, max_shard_size=1500)
    outcome = execute(build_plan(remote.request(method=method, max_shard_size=1500)), threads=2)
    assert outcome.committed and outcome.redone == len(outcome.receipts) == len(wanted) - 1 > 3
    assert remote.shards() == wanted
    cache = remote.farm.root / "cache"
    assert not list(cache.rglob("*.safetensors")) and not list((cache / "uploads").iterdir())
    prefix = open_prefix(f"{remote.bucket}/out")
    assert {"config.json", "tokenizer_config.json", "README.md"} < set(prefix.files())
    receipts = json.loads(prefix.read("resafe-receipts.json"))
    states = receipts["remote_files"]["a"]
    assert [state[0] for state in states] == [f"{remote.bucket}/tuned1/model.safetensors"] and len(states[0][2]) > 30
    assert "ETags" in prefix.read("README.md").decode()
    assert all(not check.problems for check in verify(f"{remote.bucket}/out"))


def test_verify_reads_every_byte_as_a_stream(remote: RemoteFarm, counted: Counted) -> None:
    execute(build_plan(remote.request()), threads=1)
    prefix, name = open_prefix(f"{remote.bucket}/out"), "model-00002-of-00003.safetensors"
    data = bytearray(prefix.read(name))
    data[-1] ^= 1
    prefix.put(name, bytes(data))
    prefix.delete(["model-00003-of-00003.safetensors"])
    counted.ranges.clear()
    checks = {check.receipt.file: check.problems for check in verify(f"{remote.bucket}/out")}
    assert "SHA-256 differs" in checks[name][0] and "is missing" in checks["model-00003-of-00003.safetensors"][0]
    assert not checks["model-00001-of-00003.safetensors"]
    assert counted.nbytes(name) == len(data)
    with pytest.raises(InputError, match="has no resafe-receipts.json"):
        verify(f"{remote.bucket}/base")


@pytest.fixture
def large(bucket: str, tmp_path: Path) -> Path:
    """Three models of 4 MB, also in the bucket."""
    for k, name in enumerate(("base", "one", "two")):
        generator = torch.Generator().manual_seed(k)
        values = {f"layers.{i}.w": torch.randn(512, 1024, generator=generator).bfloat16() for i in range(4)}
        write(tmp_path / name, {**values, "steps": torch.tensor(3)}, shards=2)
        send(tmp_path / name, f"{bucket}/{name}")
    return tmp_path


def large_request(bucket: str, out: object, **changes):
    from resafe.engine import Request

    models = tuple(Input(f"{bucket}/{name}", name) for name in ("one", "two"))
    return Request(**{"base": f"{bucket}/base", "models": models, "out": out, **changes})


def test_only_what_is_needed_is_fetched(large: Path, bucket: str, counted: Counted, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 128 << 10)
    plan = build_plan(large_request(bucket, large / "out", method="average"))
    assert counted.nbytes() < 3 * 2 * (65 << 10)  # the planning: headers, and a little with each
    needed = plan.bytes_read
    assert not plan.needs_base and needed == 2 * 4 * (1 << 20) + 8
    counted.ranges.clear()
    execute(plan, threads=2)
    assert needed <= counted.nbytes() + 8 <= 1.2 * needed
    assert counted.nbytes("/base/") <= 128 << 10  # the one integer that is copied
    assert max(counted.ranges.values()) == 1


def test_the_cache_of_blocks_keeps_to_its_bytes(large: Path, bucket: str, counted: Counted, monkeypatch) -> None:
    request = large_request(bucket, large / "out", method="ties", memory="8MB")
    plan = build_plan(request)
    held, fetch = [], RemoteFile.fetch

    def watched(file: RemoteFile, start: int, stop: int) -> memoryview:
        held.append(plan.files.blocks.held)
        return fetch(file, start, stop)

    monkeypatch.setattr(RemoteFile, "fetch", watched)
    counted.ranges.clear()
    execute(plan, threads=1)
    assert 2_000_000 < max(held) <= 4_000_000  # half of the memory
    assert plan.bytes_read <= counted.nbytes() <= 1.2 * plan.bytes_read
    assert max(counted.ranges.values()) == plan.passes == 3
    again = build_plan(large_request(bucket, large / "again", method="ties", memory="64MB"))
    threads = fit_threads(again, 64)
    assert 3 * 3 * again.files.blocks.size * threads <= 32_000_000 and 1 <= threads < 64
    assert needed_memory(again, threads + 1) > 64_000_000


def test_blocks_give_the_files_bytes_to_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(0).randbytes(10_007)
    monkeypatch.setattr(RemoteFile, "fetch", lambda file, start, stop: memoryview(content[start:stop]))
    file, cache = RemoteFile("s3://bucket/file", len(content), "tag", "", None), blocks.Blocks(1_000, block=64)

    def reads(seed: int) -> int:
        rng = random.Random(seed)
        for _ in range(300):
            start = rng.randrange(len(content))
            buffer = bytearray(min(rng.randrange(1, 400), len(content) - start))
            cache.read(file, start, memoryview(buffer))
            assert buffer == content[start : start + len(buffer)]
        return cache.held

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(reads, range(4))) <= 1_000
    cache.close()
    assert cache.held == 0


def test_a_plan_reads_headers_only(large: Path, bucket: str, counted: Counted, tmp_path: Path, capsys) -> None:
    from resafe.cli.fuse import show_plan

    recipe = tmp_path / "fuse.yaml"
    recipe.write_text(json.dumps({"base": f"{bucket}/base", "models": [f"{bucket}/one"], "out": f"{bucket}/x"}))
    show_plan(recipe, [], True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["fused"] == 4 and facts["bytes_read"] == 2 * 4 * (1 << 20) + 8 and facts["seconds"] is None
    assert counted.nbytes() < 2 * 2 * (65 << 10) + 1000
    show_plan(recipe, [], False)
    assert "not estimated" in capsys.readouterr().out


KILLED = """
import sys, time
from resafe.checkpoints.storage import Prefix
from resafe.engine import build_plan, execute, Input, Request
put = Prefix.put
def told(prefix, name, content):
    if len(sent) == 2:
        print("two are sent", flush=True)
        time.sleep(60)
    found = put(prefix, name, content)
    sent.extend([name] * name.endswith(".safetensors"))
    return found
sent, bucket = [], sys.argv[1]
Prefix.put = told
models = (Input(f"{bucket}/tuned1", "a"), Input(f"{bucket}/tuned2", "b"))
execute(build_plan(Request(f"{bucket}/base", models, f"{bucket}/out", "ties", max_shard_size=1500)), threads=1)
"""


def test_a_killed_run_goes_on_behind_its_uploads(remote: RemoteFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = local(remote.farm, "there", method="ties", max_shard_size=1500)
    script = remote.farm.root / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), remote.bucket]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"two are sent\n"
        process.send_signal(signal.SIGKILL)
    with pytest.raises(InputError) as caught:
        open_checkpoint(f"{remote.bucket}/out")
    assert "has no model.safetensors" in caught.value.message and "index file" in caught.value.hint
    # The third file was ready, its upload begun; the fourth may have been made meanwhile, if the kill came late.
    made = len(list((remote.farm.root / "cache" / "uploads").glob("*/*.receipt")))
    assert made in (3, 4)
    put, sent = Prefix.put, []

    def told(prefix: Prefix, name: str, content: Path | bytes) -> str:
        sent.append(name)
        return put(prefix, name, content)

    monkeypatch.setattr(Prefix, "put", told)
    outcome = execute(build_plan(remote.request(method="ties", max_shard_size=1500)), threads=1)
    weights = [name for name in sent if name.endswith(".safetensors")]
    assert outcome.committed and len(weights) == len(outcome.receipts) - 2
    assert len(outcome.receipts) == 4 and outcome.redone == 4 - made  # what waited for its upload is not made again
    assert sent[-2:] == ["model.safetensors.index.json", "config.json"]
    assert remote.shards() == wanted


def test_a_failed_upload_keeps_the_file(remote: RemoteFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Prefix.put

    def failing(prefix: Prefix, name: str, content: Path | bytes) -> str:
        if name.startswith("model-00002"):
            raise ResafeError("the line is cut")
        return put(prefix, name, content)

    monkeypatch.setattr(Prefix, "put", failing)
    with pytest.raises(ResafeError, match="line is cut"):
        execute(build_plan(remote.request()), threads=1)
    monkeypatch.setattr(Prefix, "put", put)
    outcome = execute(build_plan(remote.request()), threads=1)
    assert outcome.committed and outcome.redone == 0  # all three were computed; two were still to be sent
    assert remote.shards() == local(remote.farm, "there")


def test_ranks_share_the_prefix_and_the_cache(remote: RemoteFarm) -> None:
    outcomes = [execute(build_plan(remote.request()), threads=1, rank=rank, world=2) for rank in (1, 0)]
    assert [outcome.committed for outcome in outcomes] == [False, True]
    assert [outcome.redone for outcome in outcomes] == [1, 2]
    assert remote.shards() == local(remote.farm, "there")


def test_the_command_line_takes_addresses(remote: RemoteFarm) -> None:
    from typer.testing import CliRunner

    from resafe.cli.app import app

    recipe, out = remote.farm.root / "fuse.yaml", f"{remote.bucket}/out"
    models = [f"{remote.bucket}/tuned1", f"file://{remote.farm.root}/tuned2"]
    recipe.write_text(json.dumps({"base": f"{remote.bucket}/base", "models": models}))
    done = CliRunner().invoke(app, ["fuse", str(recipe), "--out", out, "--quiet", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["out"] == out and remote.shards() == local(remote.farm, "there")
    assert CliRunner().invoke(app, ["verify", out]).exit_code == 0
    send(remote.farm.root / "base", f"{remote.bucket}/theirs")
    refused = CliRunner().invoke(app, ["fuse", str(recipe), "--out", f"{remote.bucket}/theirs", "--quiet"])
    assert isinstance(refused.exception, InputError) and refused.exception.exit_code == 2


def test_a_file_that_changes_is_found(remote: RemoteFarm) -> None:
    plan = build_plan(remote.request())
    before = plan.digest
    changed = bytearray((remote.farm.root / "tuned1" / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    open_prefix(f"{remote.bucket}/tuned1").put("model.safetensors", bytes(changed))
    with pytest.raises(InputError, match=r"tuned1/model.safetensors: changed since it was opened"):
        execute(plan, threads=1)
    again = build_plan(remote.request())
    assert again.digest != before
    opened = open_checkpoint(f"{remote.bucket}/tuned1")
    open_prefix(f"{remote.bucket}/tuned1").delete(["model.safetensors"])
    with pytest.raises(InputError, match="is not there"):
        opened.read("model.layers.0.norm.weight")


def test_tensors_of_a_remote_checkpoint(remote: RemoteFarm) -> None:
    found, wanted = open_checkpoint(f"{remote.bucket}/base"), open_checkpoint(remote.farm.root / "base")
    assert found.config == wanted.config and found.nbytes == wanted.nbytes
    for name in wanted.tensors:
        assert torch.equal(found.read(name), wanted.read(name)) and found.read(name).dtype == wanted.read(name).dtype
    assert found.digest != wanted.digest and found.digest == open_checkpoint(f"{remote.bucket}/base/").digest
    assert read_header(found.files[0]).keys() == read_header(wanted.files[0]).keys()


def test_a_large_file_goes_in_parts(bucket: str) -> None:
    prefix, content = open_prefix(f"{bucket}/parts"), bytes(range(256)) * (9 << 12)
    etag = prefix.put("file", content)
    file = prefix.files()["file"]
    assert file.etag == etag and etag.endswith('-2"')  # S3 marks so that there were two parts
    assert file.size == len(content) == 9 << 20 and file.fetch(5, 9 << 20) == content[5:]


def test_what_cannot_be_used_is_said(bucket: str, server: str, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match="there is no bucket s3://no-such-bucket"):
        open_checkpoint("s3://no-such-bucket/model")
    with pytest.raises(InputError, match="there are no files"):
        open_checkpoint(f"{bucket}/model")
    open_prefix(f"{bucket}/half").put("model.gguf", b"GGUF")
    with pytest.raises(InputError, match="only model.gguf"):
        open_checkpoint(f"{bucket}/half")
    with pytest.raises(InputError, match="is an address, not a directory"):
        resafe.checkpoints.staging.check_replaceable(Path("s3://bucket/out"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"{server}/credentials")
    with pytest.raises(InputError, match="there are no credentials") as caught:
        open_checkpoint(f"{bucket}/model")
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InputError, match="needs the obstore package") as caught:
        open_checkpoint(f"{bucket}/model")
    assert caught.value.hint == "pip install 'resafe[remote]'"


def test_a_prefix_that_is_not_ours_is_left_alone(remote: RemoteFarm) -> None:
    for name in ("out", "nested/deeper"):
        open_prefix(f"{remote.bucket}/{name}").put("thesis.txt", b"precious")
    for out in ("out", "nested"):
        with pytest.raises(InputError, match="resafe did not write it"):
            execute(build_plan(remote.request(out)), threads=1)
    assert list(open_prefix(f"{remote.bucket}/out").files()) == ["thesis.txt"]


def test_of_two_runs_on_one_prefix_the_later_one_has_it(remote: RemoteFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Prefix.put

    def overtaken(prefix: Prefix, name: str, content: Path | bytes) -> str:
        if name.startswith("model-00003"):
            put(prefix, "resafe.json", b'{"written_by": "resafe", "plan": "of another machine"}')
        return put(prefix, name, content)

    monkeypatch.setattr(Prefix, "put", overtaken)
    with pytest.raises(ResafeError, match="another run has begun"):
        execute(build_plan(remote.request()), threads=1)
    assert "config.json" not in open_prefix(f"{remote.bucket}/out").files()


def test_an_earlier_output_goes_before_the_new_one_comes(remote: RemoteFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(build_plan(remote.request(max_shard_size=1000)), threads=1)
    many, calls = len(remote.shards()), []
    put, delete = Prefix.put, Prefix.delete
    monkeypatch.setattr(Prefix, "delete", lambda p, names: [calls.extend(names), delete(p, names)][1])
    monkeypatch.setattr(Prefix, "put", lambda p, name, content: [calls.append(name), put(p, name, content)][1])
    execute(build_plan(remote.request(max_shard_size="1GB")), threads=1)
    assert many > 3 and list(remote.shards()) == ["model.safetensors"]
    assert calls[:2] == ["config.json", "model.safetensors.index.json"] and calls[-1] == "config.json"
    assert open_checkpoint(f"{remote.bucket}/out").kind == "model"


def test_an_adapter_from_a_bucket_on_a_local_base(lab, bucket: str, tmp_path: Path) -> None:
    adapter = make(lab, tmp_path / "adapter", lora_alpha=8)
    url = send(adapter, f"{bucket}/adapter")
    resafe.fuse(lab.root / "base", [adapter], out=tmp_path / "there", threads=1)
    resafe.fuse(lab.root / "base", [url], out=tmp_path / "here", threads=1)
    for path in (tmp_path / "there").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "here" / path.name).read_bytes()
    # A base in the bucket cannot be compared with the adapter's own by digest; its names and shapes can.
    base = send(lab.root / "base", f"{bucket}/base")
    plan = build_plan(resafe.engine.Request(base, (Input(url, "a"),), tmp_path / "x"))
    assert any("is taken for" in note for note in plan.notes)
    resafe.fuse(
        lab.root / "base", [Input(url, "a"), Input(url, "b")], out=f"{bucket}/sum", output="adapter", weights=[0.5, 0.5]
    )
    written = open_checkpoint(f"{lab.root / 'base'}+{bucket}/sum")
    assert written.kind == "adapter" and written.config["r"] == 8


def test_a_model_is_downloaded_whole_to_be_loaded_once(lab, bucket: str, counted: Counted, tmp_path: Path) -> None:
    adapter = send(make(lab, tmp_path / "adapter", lora_alpha=8), f"{bucket}/adapter")
    base = send(lab.root / "base", f"{bucket}/base")
    wanted = load_model(open_checkpoint(f"{lab.root / 'base'}+{tmp_path / 'adapter'}")).state_dict()
    found = load_model(open_checkpoint(f"{base}+{adapter}")).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    size = sum(file.size for file in open_checkpoint(base).remote)
    counted.ranges.clear()
    load_model(open_checkpoint(base))
    assert counted.nbytes() < min(size, 70_000)  # headers
