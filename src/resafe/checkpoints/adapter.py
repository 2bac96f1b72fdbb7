"""Which weight of the base each tensor of a LoRA adapter belongs to, and whether the two fit.

Knows PEFT's naming in saved files. Matches modules by name, never by architecture, and reads no tensor: shapes are
enough. LoRA: Hu et al., 2021 (arXiv 2106.09685); a module's update is B·A, with A of shape (rank, in) and B of shape
(out, rank).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import InputError, listed

if TYPE_CHECKING:
    from resafe.checkpoints.reader import Checkpoint

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|base_layer)(?:\.(?P<leaf>weight|bias))?"
)

_PLAIN_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` of PEFT 0.21 that leave the base as it is."""

_LOST_STARTS = ("corda", "lora_ga")
"""Those that rewrite the base by data, so that PEFT cannot do it again as it loads the adapter."""

VARIANTS = (
    "use_dora", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config",
    "monteclora_config", "kasa_config", "target_parameters", "layer_replication",
)  # fmt: skip
"""Fields of a LoRA configuration that, where they are set, make more of an adapter than W + s B A (PEFT 0.21)."""

_OWN_SHAPES = ("layer_replication", "use_qalora", "use_bdlora")
"""Those with which the factors' shapes do not tell the weight's."""

EXPERTS = (
    "merge the adapter into its model (merge_and_unload of PEFT) and fuse the merged model, whose files hold the "
    "experts one by one again; masks and evaluations take the adapter as it is"
)
"""What to do with an adapter on experts that transformers merges, where the files alone are read."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AdapterModule:
    """The tensors an adapter holds for one module.

    Attributes:
        module: The module's name in the base, for example `model.layers.0.self_attn.q_proj`.
        parts: Tensor name in the adapter's file by role: "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B",
            "lora_magnitude_vector" (DoRA), "lora_B.bias", "weight" or "bias" (a full tensor that replaces the base's).
    """

    module: str
    parts: Mapping[str, str]


def adapter_modules(names: Mapping[str, Any] | list[str]) -> dict[str, AdapterModule]:
    """Groups an adapter's tensor names by the module they change, in the order they come.

    Args:
        names: Names as PEFT saves them, `base_model.model.<module>.lora_A.weight` and the like.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        bare = name.removeprefix(_PREFIX)
        matched = _PART.fullmatch(bare)
        if matched is None:
            module, _, role = bare.rpartition(".")
        else:
            module, role, leaf = matched["module"], matched["part"], matched["leaf"]
            if role == "base_layer":
                role = leaf or role
            elif leaf == "bias":
                role = f"{role}.bias"
        found.setdefault(module, {})[role] = name
    return {module: AdapterModule(module, parts) for module, parts in found.items()}


def rewriting_start(config: Mapping[str, Any]) -> str | None:
    """The start of an adapter (`init_lora_weights`) that rewrites the base's weights; None where the base stays.

    PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the factors out of the base and leave a residual in it. The adapter's
    files hold the factors alone: they belong on the residual, which PEFT makes anew as it loads the adapter. A start
    that is not known here counts as one of them. KaSA, which is no start, takes the smallest singular values out.
    """
    if config.get("kasa_config"):
        return "kasa"
    start = config.get("init_lora_weights")
    return None if str(start).lower() in _PLAIN_STARTS else str(start)


def check_everywhere(adapter: Checkpoint) -> None:
    """Checks that an adapter acts on every token of a text.

    Raises:
        InputError: It is an activated LoRA (arXiv 2504.12397), which works from its invocation tokens on.
    """
    if adapter.config.get("alora_invocation_tokens"):
        raise InputError(
            f"{adapter.reference} is an activated LoRA (alora_invocation_tokens): it changes the model after its "
            "invocation tokens alone, so that no weights are those of the tuned model",
            "tune without alora_invocation_tokens",
        )


def check_additive(adapter: Checkpoint) -> None:
    """Checks that an adapter's product may be added to its base as the files hold it.

    Raises:
        InputError: The adapter belongs on a base that its start has rewritten, or works on a part of a text only.
    """
    check_everywhere(adapter)
    if start := rewriting_start(adapter.config):
        raise InputError(
            f"{adapter.reference} was started by init_lora_weights {start!r}, which takes the factors out of the base: "
            "on the base as its files hold it the adapter is another model",
            "to mask or realign it take it as its weights (space: weights); else merge it into its model "
            "(merge_and_unload of PEFT) and give the merged model, or convert it to plain LoRA (PEFT's save_pretrained "
            "with path_initial_model_for_weight_conversion)",
        )


def check_layers(adapter: Checkpoint) -> None:
    """Checks that an adapter's model has the layers of its base, so that the two can be compared.

    Raises:
        InputError: The adapter repeats layers.
    """
    if adapter.config.get("layer_replication"):
        raise InputError(
            f"{adapter.reference} repeats layers of its base (layer_replication), which has no model of as many layers",
            "take its own tensors beside those of the aligned adapter that it continues (space: factors), or save the "
            "model with its repeated layers and tune on that",
        )


def check_loads(adapter: Checkpoint) -> None:
    """Checks that PEFT makes the model that was trained when it loads an adapter on its base.

    It takes a LoRA-GA adapter without a word, and the base as it is.

    Raises:
        InputError: The base was rewritten from data that the files do not hold, or the adapter works on a part of a
            text only.
    """
    check_everywhere(adapter)
    start = str(rewriting_start(adapter.config)).lower()
    if start.startswith(_LOST_STARTS):
        raise InputError(
            f"{adapter.reference} was started by init_lora_weights {start!r}, which rewrites the base from data: PEFT "
            "cannot do that again as it loads the adapter",
            "save it where it was trained: merged into its model, or as plain LoRA (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion). Where the base given is the rewritten one, set "
            "init_lora_weights: true in adapter_config.json",
        )


def base_reference(config: Mapping[str, Any], directory: Path) -> str | None:
    """The base that an adapter's configuration names; a path is tried from the adapter's directory first.

    Returns:
        None if the configuration names no base.
    """
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip():
        return None
    try:
        beside = directory / named
        if beside.exists():
            return str(beside)
    except (OSError, ValueError):
        pass
    revision = config.get("revision")
    hub_like = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", named) is not None and not Path(named).exists()
    return f"{named}@{revision}" if hub_like and isinstance(revision, str) and revision else named


def base_tensor(module: str, base: Checkpoint, shape: Shape | None = None, leaf: str = "weight") -> str | None:
    """The name, in the base's files, of the tensor that a module owns.

    Tied weights are stored once: a module that is missing from a base with tied embeddings stands for the
    vocabulary-sized tensor of the wanted shape. Models with experts have modules around them that transformers renames
    as it loads them: the one of this name in the layer is taken.

    Args:
        module: The module's name as the adapter has it.
        base: The base model.
        shape: The shape the adapter expects; needed for tied weights only.
        leaf: "weight" or "bias".
    """
    name = f"{module}.{leaf}"
    if name in base.tensors:
        return name
    # A checkpoint of the bare model carries the same names without the task model's outer prefix.
    shorter = [candidate for candidate in base.tensors if name.endswith(f".{candidate}")]
    if len(shorter) == 1:
        return shorter[0]
    if leaf == "weight" and shape is not None and base.config.get("tie_word_embeddings"):
        tied = [info.name for info in base.tensors.values() if info.shape == shape]
        return tied[0] if len(tied) == 1 and shape[0] == base.config.get("vocab_size") else None
    layer = re.match(r".+?\.\d+\.", module)
    if layer is not None and any(".experts." in candidate for candidate in base.tensors):
        ending = f".{module.rpartition('.')[2]}.{leaf}"
        renamed = [stored for stored in base.tensors if stored.startswith(layer[0]) and stored.endswith(ending)]
        return renamed[0] if len(renamed) == 1 else None
    return None


def check_adapter_fits(adapter: Checkpoint, base: Checkpoint) -> None:
    """Checks that every module the adapter changes is in the base, with the shape the adapter expects.

    Only LoRA adapters (with DoRA and fully trained modules) are checked; other kinds are left to PEFT.

    Raises:
        InputError: The adapter belongs to another base; up to ten tensors are named.
    """
    check_shapes_fit(
        {name: info.shape for name, info in adapter.tensors.items()}, adapter.config, base, str(adapter.path)
    )


def check_shapes_fit(shapes: Mapping[str, Shape], config: Mapping[str, Any], base: Checkpoint, where: str) -> None:
    """`check_adapter_fits` for tensors that are not files yet; `where` names them in the error."""
    if str(config.get("peft_type", "LORA")).upper() != "LORA" or any(config.get(field) for field in _OWN_SHAPES):
        return
    problems: list[str] = []
    for module in adapter_modules(list(shapes)).values():
        parts = {role: shapes[name] for role, name in module.parts.items()}
        if config.get("target_parameters") and any(name.startswith(f"{module.module}.") for name in base.tensors):
            continue  # LoRA on a bare parameter: the saved name does not say which one
        if over_experts(module.module) and any(".experts." in name for name in base.tensors):
            continue  # transformers merges and renames what the files hold one by one
        first = next(iter(module.parts.values()))
        problems += [f"{first}: {problem}" for problem in _module_problems(module, parts, config, base)]
    if problems:
        raise InputError(
            f"{where}: adapter of another base, it does not fit {base.reference}:\n  {listed(problems)}",
            "give the base it was trained on: BASE+ADAPTER",
        )


def over_experts(module: str) -> bool:
    """Whether PEFT's name of a module is that of all experts of a layer together."""
    return re.fullmatch(r".+\.experts(?:\.base_layer)*", module) is not None


def _module_problems(
    module: AdapterModule, parts: Mapping[str, Shape], config: Mapping[str, Any], base: Checkpoint
) -> list[str]:
    """What is wrong with one module; one problem at most for each of its tensors."""
    problems = []
    wanted, problem = _update_shape(parts, bool(config.get("fan_in_fan_out")))
    if problem:
        return [problem]
    if wanted is not None:
        name = base_tensor(module.module, base, wanted)
        if name is None:
            return [f"the base has no module {module.module}"]
        have = base.tensors[name].shape
        if have != wanted:
            return [f"it changes a weight of shape {wanted}, the base's {name} has {have}"]
    for leaf in ("weight", "bias"):
        if leaf not in parts:
            continue
        name = base_tensor(module.module, base, parts[leaf], leaf)
        if name is None:
            problems.append(f"the base has no {module.module}.{leaf}")
        elif base.tensors[name].shape != parts[leaf]:
            problems.append(f"it replaces {name} by shape {parts[leaf]}, the base has {base.tensors[name].shape}")
    return problems


def _update_shape(parts: Mapping[str, Shape], fan_in_fan_out: bool) -> tuple[Shape | None, str]:
    """The shape of the base weight that A and B change (None if there are none), and what is wrong with the two."""
    for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if first not in parts and second not in parts:
            continue
        if first not in parts or second not in parts:
            return None, f"{first if first in parts else second} has no {second if first in parts else first}"
        down, up = parts[first], parts[second]
        if len(down) < 2 or len(up) < 2 or down[0] != up[1]:
            return None, f"{first} {down} and {second} {up} do not share a rank"
        if first == "lora_embedding_A":
            return (down[1], up[0]), ""
        if fan_in_fan_out and len(down) == 2:
            return (down[1], up[0]), ""
        return (up[0], *down[1:]), ""
    return None, ""
