"""The model card of a fusion. Knows a plan; writes no file."""

from __future__ import annotations

from typing import Any

import yaml

from resafe.engine.plan import Plan


def fusion_card(plan: Plan, facts: dict[str, Any]) -> str:
    """README.md: what was fused, how, from what, and how to check it."""
    method = plan.method
    front = {"library_name": "transformers", "tags": ["resafe", "model-fusion", plan.fusion.name]}
    rows = [
        f"| {name} | {reference} | {weight} | `{digest}` |"
        for (name, digest), reference, weight in zip(
            facts["inputs"].items(),
            [plan.base.reference, *(model.checkpoint.reference for model in plan.models)],
            ["", *(_shown(given.weight) for given in plan.request.models)],
            strict=True,
        )
    ]
    settings = yaml.safe_dump(dict(facts["settings"]), sort_keys=False) if facts["settings"] else "none\n"
    return (
        f"---\n{yaml.safe_dump(front)}---\n\n# {plan.request.name}\n\n"
        f"Fused by resafe: {method.title} ({method.source}), seed {plan.fusion.seed}, task vectors taken from the base "
        "and accumulated in float32.\n\n"
        "| model | reference | coefficient | digest |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n\n"
        f"{_remote(plan)}Settings:\n\n```yaml\n{settings}```\n\n"
        f"{_vocabulary(plan)}Configuration, tokenizer, chat template and generation settings are the base's. "
        "`resafe verify DIRECTORY` checks every file against its receipt.\n"
    )


def _remote(plan: Plan) -> str:
    """What the digest of a model in object storage is taken of."""
    if not plan.remote:
        return ""
    return (
        f"Read from object storage: {', '.join(plan.remote)}. Their digests are over the addresses, sizes and ETags of "
        "their files (listed in the receipts), not over their bytes.\n\n"
    )


def _vocabulary(plan: Plan) -> str:
    if plan.extended is None:
        return ""
    known = plan.extended.extension
    more = f", and {len(known.tokens)} that tuned models added: each is the mean of their rows" if known.tokens else ""
    return f"Vocabularies were matched by token string; it has the base's tokens{more}.\n\n"


def _shown(weight: Any) -> str:
    return f"{weight:g}" if isinstance(weight, (int, float)) else str(weight).replace("|", "\\|")
