"""`resafe verify`: checks what `resafe fuse` wrote."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def verify(
    directory: Annotated[str, typer.Argument(help="what resafe fuse wrote: a directory, or s3://bucket/prefix")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Check every file against its receipt (length, SHA-256), and name tensors with NaN or infinite values."""
    from resafe.checkpoints import parse_output
    from resafe.engine import verify as check
    from resafe.errors import ResafeError

    checks = check(parse_output(directory))
    bad = {found.receipt.file: list(found.problems) for found in checks if found.problems}
    if as_json:
        sys.stdout.write(json.dumps({"files": len(checks), "problems": bad}) + "\n")
    else:
        for found in checks:
            sys.stdout.write(f"{found.receipt.file}: {'; '.join(found.problems) or 'as written'}\n")
    if bad:
        raise ResafeError(f"{directory}: {len(bad)} of {len(checks)} files are not as they should be", "fuse again")
