"""What the bound on a response's perplexity finds: XSTest's completions as written, their words shuffled, and noise.

    python benchmarks/coherence.py DATA_DIR [--json]

Prints the perplexity under SmolLM2-135M-Instruct of texts cut to 12 and to 48 tokens, and the share that is called
broken. `coherence_false_alarms` is the share of texts as written, over both lengths.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import base_model, finish

from resafe.checkpoints import load_model, load_tokenizer
from resafe.data.sources import read_file
from resafe.evals.safety.judging import incoherent, perplexities_of
from resafe.evals.safety.settings import SafetySettings

TEXTS = 160
LENGTHS = (12, 48)


def kinds(texts: list[str], tokenizer: Any, length: int, source: random.Random) -> dict[str, list[str]]:
    """Texts of the length as written, with shuffled words, and of random tokens."""
    encoded = [tokenizer(text)["input_ids"][:length] for text in texts]
    written = [tokenizer.decode(ids) for ids in encoded if len(ids) == length]
    shuffled = [" ".join(source.sample(text.split(), len(text.split()))) for text in written]
    noise = [tokenizer.decode([source.randrange(100, len(tokenizer)) for _ in range(length)]) for _ in written]
    return {"as written": written, "words shuffled": shuffled, "random tokens": noise}


def main() -> None:
    checkpoint = base_model()
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    rows = read_file(Path(sys.argv[1]) / "xstest" / "xstest_v2_completions_labelled.jsonl")
    source = random.Random(0)
    texts = [row.text("completion") for row in source.sample(rows, TEXTS)]
    most = SafetySettings(sets=("harmful",)).most_perplexity
    alarms: list[bool] = []
    print(f"{'texts':24} {'n':>4} {'lowest':>8} {'median':>8} {'highest':>8} broken")
    for length in LENGTHS:
        for kind, chosen in kinds(texts, tokenizer, length, source).items():
            found = [one for one in perplexities_of(model, tokenizer, chosen) if one is not None]
            values = np.array([value for value, _ in found])
            broken = [incoherent(value, tokens, most) for value, tokens in found]
            alarms += broken if kind == "as written" else []
            shown = f"{values.min():8.3g} {np.median(values):8.3g} {values.max():8.3g}"
            print(f"{length:2} tokens, {kind:14} {len(found):4} {shown} {np.mean(broken):6.2f}")
    finish({"coherence_false_alarms": float(np.mean(alarms))})


if __name__ == "__main__":
    main()
