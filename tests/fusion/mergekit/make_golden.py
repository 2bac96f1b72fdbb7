"""Fuses the tiny models with mergekit and keeps a few of its tensors: the golden values of `test_mergekit.py`.

Run in an environment of its own, with mergekit 0.1.5 (LGPL: a test oracle only; nothing of it is in resafe):

    PYTHON -m tests.fusion.mergekit.make_golden     # PYTHON: that environment's
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

from tests.fusion.mergekit.models import CASES, COMPARED, make_models

GOLDEN = Path(__file__).with_name("golden.safetensors")


def main() -> None:
    """Writes the golden file."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base, *tuned = make_models(root)
        for case, asked in CASES.items():
            chosen = tuned[: asked.get("models", 3)]
            weights = asked.get("weights", [1.0] * len(chosen))
            entries = []
            for path, weight in zip(chosen, weights, strict=True):
                parameters = {"weight": weight} | {k: asked[k] for k in ("density", "gamma") if k in asked}
                entries.append({"model": str(path), "parameters": parameters})
            content = {**asked["theirs"], "models": entries, "dtype": "float32", "out_dtype": "float32"}
            if case != "linear":
                content["base_model"] = str(base)
            file = root / f"{case}.yaml"
            file.write_text(yaml.safe_dump(content))
            tool = Path(sys.executable).with_name("mergekit-yaml")
            subprocess.run([tool, file, root / case, "--no-copy-tokenizer"], check=True)
            merged = (
                load_file(root / case / "model.safetensors")
                if (root / case / "model.safetensors").is_file()
                else {
                    name: value
                    for path in (root / case).glob("*.safetensors")
                    for name, value in load_file(path).items()
                }
            )
            found |= {f"{case}/{name}": merged[name] for name in COMPARED}
    save_file(found, GOLDEN)


if __name__ == "__main__":
    main()
