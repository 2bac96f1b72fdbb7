"""Recipes from YAML with `a.b=c` overrides, and every mistake in them named at once. Imports no torch."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from resafe.errors import InputError
from resafe.recipe.fuse import FuseRecipe
from resafe.recipe.mask import MaskRecipe
from resafe.recipe.schema import Recipe
from resafe.registry import nearest


def load_recipe(path: Path, overrides: Sequence[str] = (), scale: str | None = None) -> Recipe:
    """Reads and checks a recipe, at every scale that it has.

    Args:
        path: A YAML file.
        overrides: `a.b=c`; the value is read as YAML. They win over the scale.
        scale: Name of a section of the recipe's `scale`, whose fields replace those of the recipe.

    Raises:
        InputError: No such file, not YAML, an unknown field (with the nearest name), a wrong value, no such scale.
    """
    raw, scales = _scales(_raw(path, ()), str(path))
    if scale is not None and scale not in scales:
        known = nearest(scale, list(scales)) if scales else "the recipe has no section `scale`"
        raise InputError(f"{path}: no scale '{scale}'", known)
    for name, changes in scales.items():
        check_recipe(_merged(raw, changes), f"{path}, scale {name}")
    chosen = _merged(raw, scales[scale]) if scale is not None else raw
    for override in overrides:
        _override(chosen, override)
    return check_recipe(chosen, str(path))


def _scales(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The recipe without its scales, and the scales."""
    scales = raw.get("scale") or {}
    if not isinstance(scales, dict) or not all(isinstance(changes, dict) for changes in scales.values()):
        raise InputError(f"{where}: scale: not a mapping of names to fields", "for example: scale: {smoke: {seeds: 1}}")
    return {key: value for key, value in raw.items() if key != "scale"}, scales


def _merged(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with changes over them: mappings are merged, all else is replaced."""
    found = dict(raw)
    for key, value in changes.items():
        old = found.get(key)
        found[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def load_fuse(path: Path, overrides: Sequence[str] = ()) -> FuseRecipe:
    """Reads and checks a fusion file; as `load_recipe`."""
    return _checked(FuseRecipe, _raw(path, overrides), str(path))


def load_mask(path: Path, overrides: Sequence[str] = ()) -> MaskRecipe:
    """Reads and checks the recipe of a mask; as `load_recipe`."""
    return _checked(MaskRecipe, _raw(path, overrides), str(path))


def _kind(raw: Mapping[str, Any]) -> Any:
    """The schema that a file is meant for, told by the field that only it has; None where none is there."""
    fields = {"tune": Recipe, "models": FuseRecipe, "tuned": MaskRecipe}
    return next((schema for field, schema in fields.items() if field in raw), None)


def is_fusion(path: Path) -> bool:
    """Whether a file is a fusion and no recipe: it names models to combine, and nothing to tune.

    Raises:
        InputError: No such file, or not YAML.
    """
    return _kind(_raw(path, ())) is FuseRecipe


def is_mask(path: Path) -> bool:
    """Whether a file is the recipe of a mask: it names tuned models, and nothing to tune; otherwise as `is_fusion`."""
    return _kind(_raw(path, ())) is MaskRecipe


def _raw(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such recipe", f"recipes there: {', '.join(near)}" if near else "check the path")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not valid YAML: {' '.join(str(error).split())}", "mend the line that it names"
        ) from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of fields", "see recipes/demo.yaml for an example")
    for override in overrides:
        _override(raw, override)
    return raw


def check_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain values; all mistakes are listed in one error."""
    return _checked(Recipe, raw, where)


Schema = TypeVar("Schema", bound=BaseModel)


def _checked(schema: type[Schema], raw: dict[str, Any], where: str) -> Schema:
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        if (other := _kind(raw)) not in (None, schema):
            told = {Recipe: ("recipe", "run"), FuseRecipe: ("fusion", "fuse"), MaskRecipe: ("mask", "mask train")}
            what, verb = told[other]
            raise InputError(f"{where}: is the file of a {what}", f"resafe {verb} {where}") from None
        lines = [_explain(detail, schema) for detail in error.errors()]
        plural = "mistakes" if len(lines) > 1 else "mistake"
        raise InputError(
            f"{where}: {len(lines)} {plural}\n  " + "\n  ".join(lines), "mend the recipe and run again"
        ) from None


def _override(raw: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key.strip():
        raise InputError(f"override '{override}' is not of the form a.b=c", "for example: align.sft.steps=50")
    place: Any = raw
    *parents, leaf = key.strip().split(".")
    for depth, parent in enumerate(parents, start=1):
        if place.get(parent) is None:  # absent, or null: an optional group that the override begins
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            where = ".".join(parents[:depth])
            raise InputError(f"override '{override}': '{where}' is not a group of fields", "name a field in a group")
    try:
        place[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"override '{override}': the value is not valid YAML", "quote it") from None


def _explain(detail: Any, schema: type[BaseModel]) -> str:
    location = [str(part) for part in detail["loc"]]
    where = ".".join(location) or "recipe"
    if detail["type"] == "extra_forbidden":
        known = _fields_at(location[:-1], schema)
        hint = f" ({nearest(location[-1], known)})" if known else ""
        return f"{where}: unknown field{hint}"
    if detail["type"] == "missing":
        return f"{where}: this field is needed"
    message = detail["msg"].removeprefix("Value error, ")
    return message if detail["type"] == "value_error" and not location else f"{where}: {message}"


def _fields_at(location: Sequence[str], schema: type[BaseModel]) -> list[str]:
    """The fields that a place in a recipe may have, found by walking the schema."""
    current: Any = schema
    for part in location:
        current = _member(current, part)
        if current is None:
            return []
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _member(current: Any, part: str) -> Any:
    if isinstance(current, type) and issubclass(current, BaseModel):
        field = current.model_fields.get(part)
        return _plain(field.annotation) if field else None
    if typing.get_origin(current) in (dict, list):
        return _plain(typing.get_args(current)[-1])
    return None


def _plain(annotation: Any) -> Any:
    """X of `X | None`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next((arg for arg in typing.get_args(annotation) if arg is not type(None)), None)
    return annotation
