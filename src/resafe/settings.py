"""Settings as they are written on a command line: NAME=VALUE."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from resafe.errors import InputError


def named_values(items: Iterable[str] | None, what: str, example: str = "learning_rate=1e-4") -> dict[str, Any]:
    """Settings from NAME=VALUE, the values read as YAML (1e-5 as a number, too).

    Args:
        items: What was given.
        what: What messages call an item: the option that it was given with.
        example: An item that would do, for messages.

    Raises:
        InputError: An item has another form.
    """
    import yaml

    found: dict[str, Any] = {}
    for item in items or ():
        name, sign, text = item.partition("=")
        if not sign or not name.strip():
            raise InputError(f"{what} {item} is not of the form NAME=VALUE", f"for example: {example}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"{what} {item}: its value cannot be read", "quotes and brackets come in pairs") from None
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML takes 1e-5 for a text
        found[name.strip()] = tuple(value) if isinstance(value, list) else value
    return found
