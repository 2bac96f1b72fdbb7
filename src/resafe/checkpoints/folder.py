"""Where the files of a checkpoint are: all on the disk, or the weights in object storage and a copy of the others here.

Knows files by their names only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from resafe.checkpoints.hub import SCHEME, hub_files
from resafe.checkpoints.staging import staged
from resafe.checkpoints.storage import File, RemoteFile, open_prefix
from resafe.errors import InputError
from resafe.provenance import digest_value

_SMALL = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Folder:
    """A directory of a checkpoint.

    Attributes:
        path: The local directory.
        url: The address in object storage; "" for a local one.
        remote: The files that are left in object storage, by name.
    """

    path: Path
    url: str = ""
    remote: Mapping[str, RemoteFile] = field(default_factory=dict)

    def __str__(self) -> str:
        """What the user knows it by."""
        return self.url or str(self.path)

    def find(self, name: str) -> File | None:
        """A file by name; None if it is not there."""
        local = self.path / name
        return self.remote.get(name) or (local if local.is_file() else None)

    def names(self) -> list[str]:
        """Names of all files."""
        local = (entry.name for entry in self.path.iterdir() if entry.is_file())
        return sorted({*local, *self.remote})


def remote_folder(url: str, cache: Path) -> Folder:
    """Looks at an address; configuration, tokenizer and index files are copied into the cache, once for each state.

    Args:
        url: Such as `s3://bucket/models/mine`, or `hf://org/name`.
        cache: The cache directory; the copy is in `remote` in it.

    Raises:
        InputError: Nothing is there, or it may not be read.
        ResafeError: The storage cannot be reached.
    """
    url = url.rstrip("/")
    files = hub_files(url) if url.startswith(SCHEME) else open_prefix(url).files()
    if not files:
        raise InputError(f"{url}: there are no files under this address", "give the address that holds config.json")
    small = {name: file for name, file in files.items() if name.endswith(_SMALL)}
    large = {name: file for name, file in files.items() if name not in small}
    key = digest_value(sorted(file.state for file in files.values()))[:16]
    path = cache / "remote" / f"{url.rpartition('/')[2]}-{key}"
    if not path.is_dir():
        with staged(path, keep_existing=True) as stage:
            for name, file in small.items():
                file.download(stage / name)
    return Folder(path, url, large)
