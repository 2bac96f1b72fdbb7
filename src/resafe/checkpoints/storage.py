"""Object storage: files under a prefix, read by ranges and written whole. The one place that knows obstore.

Endpoint, region and credentials are obstore's business: it takes them from the environment (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, `GOOGLE_APPLICATION_CREDENTIALS`, …) and repeats what fails for a moment. Knows nothing of what
the files hold.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resafe.errors import InputError, ResafeError

SCHEMES = ("s3://", "gs://")
_HEADER = 1 << 16  # bytes that a stream fetches at least: most headers come with the first request
_AT_ONCE = 32 << 20  # bytes that a stream fetches at most
_PART = 8 << 20  # bytes of one part of an upload
_MOST_PARTS = 9_000  # S3 takes ten thousand
_PARTS_AT_ONCE = 4
_REFUSALS = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
# Without credentials obstore asks the services that cloud machines have for them; elsewhere there is none.
_ASKED_FOR_CREDENTIALS = ("/latest/api/token", "/latest/meta-data/", "169.254.170.2", "metadata.google.internal")


@dataclass(frozen=True)
class RemoteFile:
    """A file in object storage, as it was when it was listed. Two are equal if they are the same state of one file.

    Attributes:
        url: Its address.
        size: Its length in bytes.
        etag: What the store calls this state of it; "" where the store has no ETags.
        version: The store's version of it, or where it has no ETag the time of its last change; may be "".
    """

    url: str
    size: int
    etag: str
    version: str
    _store: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        """Its address, for messages."""
        return self.url

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.url.rpartition("/")[2]

    @property
    def state(self) -> list[Any]:
        """What tells this state of the file from any other: address, bytes, ETag, version."""
        return [self.url, self.size, self.etag, self.version]

    def fetch(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the file, in one request.

        Raises:
            InputError: The file is another one than was listed, or it is gone.
            ResafeError: The storage cannot be reached.
        """
        if stop <= start:
            return memoryview(b"")
        options: dict[str, Any] = {"range": (start, stop)}
        if self.etag:
            options["if_match"] = self.etag
        with _explained(self.url):
            answer = _obstore(self.url).get(self._store, self.name, options=options)
            found = memoryview(answer.bytes())
        # A store may not know the condition and answer all the same.
        if len(found) != stop - start or (self.etag and answer.meta["e_tag"] != self.etag):
            raise _changed(self.url)
        return found

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The file as a stream that fetches what is read of it; the counterpart of `Path.open`."""
        return io.BufferedReader(_Stream(self), _HEADER)

    def download(self, target: Path) -> None:
        """Copies the file to the disk, unless it is there already; it appears whole or not at all.

        Raises:
            InputError: The file changed, or is gone.
            ResafeError: The storage cannot be reached.
        """
        if target.is_file() and target.stat().st_size == self.size:
            return
        partial = target.with_name(f".{target.name}.partial")
        with partial.open("wb") as stream:
            for start in range(0, self.size, _AT_ONCE):
                stream.write(self.fetch(start, min(self.size, start + _AT_ONCE)))
        partial.replace(target)


File = Path | RemoteFile
"""A weight file, on the disk or in object storage: both have a name and can be opened."""


class _Stream(io.RawIOBase):
    """A remote file as a raw stream."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._file.size, self._place + min(len(buffer), _AT_ONCE))
        found = self._file.fetch(self._place, stop)
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)


@dataclass(frozen=True)
class Prefix:
    """What is a directory on a disk: the files under an address.

    Attributes:
        url: The address, without a slash at its end.
    """

    url: str
    _store: Any = field(repr=False, compare=False)

    def files(self) -> dict[str, RemoteFile]:
        """The files directly under the address, by name; none where there is no such address.

        Raises:
            InputError: There is no such bucket, or no right to look into it.
            ResafeError: The storage cannot be reached.
        """
        with _explained(self.url):
            listed = _obstore(self.url).list_with_delimiter(self._store)["objects"]
        return {item["path"]: self._file(item) for item in listed if item["path"]}

    def is_empty(self) -> bool:
        """Whether nothing is under the address, at any depth. Raises as `files` does."""
        with _explained(self.url):
            chunks = _obstore(self.url).list(self._store, chunk_size=10)
            # Consoles mark an empty directory by an object of the directory's own name.
            return not any(item["path"] for chunk in chunks for item in chunk)

    def read(self, name: str) -> bytes:
        """The content of a small file. Raises as `RemoteFile.fetch` does."""
        with _explained(f"{self.url}/{name}"):
            return bytes(_obstore(self.url).get(self._store, name).bytes())

    def put(self, name: str, content: Path | bytes) -> str:
        """Writes a file, a large one in parts; readers see all of it or what was there before.

        Returns:
            Its ETag, "" where the store gives none.

        Raises:
            InputError: There is no such bucket, or no right to write to it.
            ResafeError: The storage cannot be reached.
        """
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        with _explained(f"{self.url}/{name}"):
            result = _obstore(self.url).put(
                self._store,
                name,
                content,
                chunk_size=max(_PART, -(-size // _MOST_PARTS)),
                max_concurrency=_PARTS_AT_ONCE,
            )
        return result["e_tag"] or ""

    def delete(self, names: Iterable[str]) -> None:
        """Removes files, in the order given. Raises as `put` does."""
        for name in names:
            with _explained(f"{self.url}/{name}"):
                _obstore(self.url).delete(self._store, name)

    def _file(self, item: Any) -> RemoteFile:
        etag = item["e_tag"] or ""
        version = item["version"] or ("" if etag else item["last_modified"].isoformat())
        return RemoteFile(f"{self.url}/{item['path']}", item["size"], etag, version, self._store)


def is_remote(place: object) -> bool:
    """Whether a text is an address in object storage."""
    return isinstance(place, str) and place.startswith(SCHEMES)


def open_prefix(url: str) -> Prefix:
    """The files under an address such as `s3://bucket/a/b`; nothing is asked of the storage yet.

    Raises:
        InputError: obstore is not installed, or the address names no bucket.
    """
    url = url.rstrip("/")
    module = _obstore(url)
    try:
        return Prefix(url, module.store.from_url(url))
    except Exception as error:  # obstore's own errors, and Python's for a malformed address
        raise InputError(
            f"{url}: is not an address ({_reason(error)})", "for example s3://bucket/models/mine"
        ) from error


def http_store(url: str, headers: dict[str, str]) -> Any:
    """A store of files that a web server gives under an address, for `RemoteFile`; nothing is asked of it yet.

    Args:
        url: The address.
        headers: Sent with every request, but not to another server that one is redirected to.

    Raises:
        InputError: obstore is not installed.
    """
    options: dict[str, Any] = {"allow_http": url.startswith("http://")}
    return _obstore(url).store.HTTPStore.from_url(
        url, client_options=options | ({"default_headers": headers} if headers else {})
    )


def _obstore(url: str) -> Any:
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        raise InputError(f"{url}: object storage needs the obstore package", "pip install 'resafe[remote]'") from error
    return obstore


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns obstore's errors into ours."""
    try:
        yield
    except ResafeError:
        raise
    except Exception as error:
        raise _error(url, error) from error


def _error(url: str, error: Exception) -> ResafeError:
    """What an error of obstore means: its classes tell some causes apart, the store's code in the text the others."""
    kind, text = type(error).__name__, str(error)
    if url.startswith("hf://"):
        return ResafeError(
            f"{url}: cannot be read from the Hub ({_reason(error)})",
            "check the connection, and `hf auth login` for a gated repository, then run again: finished files are kept",
        )
    bucket = "/".join(url.split("/")[:3])
    if kind == "PreconditionError":
        return _changed(url)
    asked = any(place in text for place in _ASKED_FOR_CREDENTIALS)
    refused = kind in ("PermissionDeniedError", "UnauthenticatedError") or any(code in text for code in _REFUSALS)
    if asked or refused:
        why = "there are no credentials" if asked else "access is refused"
        return InputError(
            f"{url}: {why} ({_reason(error)})",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (Google: GOOGLE_APPLICATION_CREDENTIALS), or "
            "AWS_SKIP_SIGNATURE=true for a public bucket",
        )
    if "NoSuchBucket" in text:
        return InputError(f"{url}: there is no bucket {bucket}", "check its name, and AWS_ENDPOINT_URL and AWS_REGION")
    if kind in ("FileNotFoundError", "NotFoundError"):
        return InputError(f"{url}: is not there", "check the address")
    return ResafeError(
        f"{url}: object storage cannot be used ({_reason(error)})",
        "check the connection and AWS_ENDPOINT_URL (AWS_ALLOW_HTTP=true for http), then run again: finished files are "
        "kept",
    )


def _changed(url: str) -> InputError:
    return InputError(f"{url}: changed since it was opened (its ETag differs)", "run again with files that stay")


def _reason(error: Exception) -> str:
    """The end of obstore's first line, which says what went wrong; the start repeats the address."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.rpartition(" - ")[2][:200]
