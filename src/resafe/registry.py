"""Registries of methods. A method is a typed function; its signature is its schema.

Other packages add methods through entry points, loaded on the first look-up.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, get_type_hints

from resafe.errors import InputError


@dataclass(frozen=True)
class Parameter:
    """One setting of a method: its name, type and default (`...` where it must be given)."""

    name: str
    type: Any
    default: Any


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: The name used in recipes and on the command line.
        title: One line for people.
        source: Paper or other origin.
        function: What is called; its keyword-only parameters are the method's settings.
        traits: Facts about the method that others read, e.g. {"trains": True}.
    """

    name: str
    title: str
    source: str
    function: Callable[..., Any]
    traits: dict[str, Any]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The keyword-only parameters of the function, in order."""
        hints = get_type_hints(self.function)
        return tuple(
            Parameter(p.name, hints.get(p.name, Any), ... if p.default is inspect.Parameter.empty else p.default)
            for p in inspect.signature(self.function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        )

    def check(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Checks settings against the signature and returns them converted to the declared types.

        Raises:
            InputError: A setting is unknown (the nearest name is given), missing, or of the wrong type or range.
        """
        from pydantic import TypeAdapter, ValidationError

        known = {parameter.name: parameter for parameter in self.parameters}
        for name in settings:
            if name not in known:
                raise InputError(f"{self.name} has no setting '{name}'", nearest(name, known))
        checked: dict[str, Any] = {}
        for name, parameter in known.items():
            if name not in settings:
                if parameter.default is ...:
                    raise InputError(f"{self.name} needs the setting '{name}'", f"add {name}: … to its settings")
                continue
            try:
                checked[name] = TypeAdapter(parameter.type).validate_python(settings[name])
            except ValidationError as error:
                reason = "; ".join(detail["msg"] for detail in error.errors())
                default = parameter.default
                raise InputError(
                    f"{self.name}: setting '{name}' = {settings[name]!r}: {reason}",
                    "leave it out, or give another" if default in (None, ...) else f"its default is {default!r}",
                ) from None
        return checked


def nearest(name: str, known: Any) -> str:
    """A hint that gives the nearest known name, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(set(known)))}"


class Registry:
    """Methods of one kind by name; filled by its decorator and by entry points of its group."""

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self._group = group
        self._methods: dict[str, Method] = {}
        self._loaded = False

    def register(self, name: str, *, title: str, source: str, **traits: Any) -> Callable[[Callable[..., Any]], Any]:
        """Decorator: adds the function under a name; the function itself is returned unchanged."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._methods:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._methods[name] = Method(name, title, source, function, traits)
            return function

        return add

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            for entry in metadata.entry_points(group=self._group):
                entry.load()

    def get(self, name: str) -> Method:
        """The method of that name.

        Raises:
            InputError: There is none; the nearest name is given.
        """
        self._load()
        if name not in self._methods:
            raise InputError(f"there is no {self.kind} '{name}'", nearest(name, self._methods))
        return self._methods[name]

    def __iter__(self) -> Iterator[Method]:
        self._load()
        return iter(sorted(self._methods.values(), key=lambda method: method.name))
