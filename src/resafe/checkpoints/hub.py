"""A repository of the Hub read by ranges (`hf://org/name`): nothing is downloaded but what is asked for.

`org/name` without the scheme is the other way: a snapshot in the Hub's own cache (`reference`). Knows the Hub's listing
and addresses; what the files hold is `shards`' business.
"""

from __future__ import annotations

import re

from resafe.checkpoints.storage import RemoteFile, http_store
from resafe.errors import InputError

SCHEME = "hf://"
_REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[^@+\s]+))?", re.ASCII)


def parse_address(url: str) -> tuple[str, str | None]:
    """Repository and revision of `hf://org/name[@revision]`.

    Raises:
        InputError: It has another form.
    """
    matched = _REPOSITORY.fullmatch(url.removeprefix(SCHEME).rstrip("/"))
    if matched is None:
        raise InputError(f"{url}: is no repository of the Hub", "write hf://org/name or hf://org/name@revision")
    return matched["name"], matched["revision"]


def hub_files(url: str) -> dict[str, RemoteFile]:
    """The files at the top of a repository, by name, at the commit that the revision stands for now.

    The commit is part of every file's address, so a branch that moves on does not change what was opened.

    Raises:
        InputError: No such repository or revision, no right to read it, or the Hub cannot be (or is not to be) reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    name, revision = parse_address(url)
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{url}: reads from the Hub, and HF_HUB_OFFLINE is set",
            f"unset it, or give {name}, which is taken from the Hub's local cache",
        )
    try:
        found = HfApi(endpoint=constants.ENDPOINT).model_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # the client's own errors and those of its transport, which differ between versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{url}: cannot be read from the Hub ({reason[:200]})",
            "check name, revision and network; for a private or gated one log in with `hf auth login`",
        ) from error
    token = get_token()
    store = http_store(
        f"{constants.ENDPOINT}/{name}/resolve/{found.sha}", {"Authorization": f"Bearer {token}"} if token else {}
    )
    return {
        file.rfilename: RemoteFile(
            f"{SCHEME}{name}@{found.sha}/{file.rfilename}", file.size, "", file.blob_id or "", store
        )
        for file in found.siblings or []
        if "/" not in file.rfilename and file.size is not None
    }
