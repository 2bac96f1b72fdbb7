"""Our generation against `model.generate` at batch 4, unsorted (the published setting), both in fp32 in one run.

SmolLM2-135M-Instruct answers 200 questions with 64 new tokens: 40 of each of the five public harm sets where
RESAFE_DATA_DIR (or ../shared/data) is there, else the shipped ones. Prints generation_speedup, the ratio of the tokens
per second, and how many texts are the same; for one that is not, the margin between the two tokens where they part.
generation_speedup_cpu is the same ratio by processor seconds, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import base_model

from resafe.checkpoints import load_model, load_tokenizer, quiet
from resafe.data import load_questions
from resafe.data.chat import render
from resafe.evals import complete
from resafe.evals.generation import stop_tokens

DATA = Path(os.environ.get("RESAFE_DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")
SETS = ("catqa", "beavertails", "harmfulqa", "dangerousqa", "shadow_alignment")
PUBLISHED_BATCH = 4


def questions(count: int) -> tuple[list[str], str]:
    """Prompts, the sets in turn as an evaluation that mixes them has them, and where they are from."""
    if DATA.is_dir():
        columns = [load_questions(name, limit=-(-count // len(SETS)), data_dir=DATA) for name in SETS]
        return [question.prompt for row in zip(*columns, strict=True) for question in row][:count], "public"
    shipped = [*load_questions("harmful"), *load_questions("harmless")]
    return [question.prompt for question in shipped][:count], "shipped"


def published(model: Any, tokenizer: Any, texts: list[str], limit: int) -> list[list[int]]:
    """`model.generate`, four prompts at a time in the order given; answers' tokens without what ends them."""
    stops = stop_tokens(model, tokenizer)
    tokenizer.padding_side = "left"
    answers = []
    for start in range(0, len(texts), PUBLISHED_BATCH):
        batch = tokenizer(
            texts[start : start + PUBLISHED_BATCH], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        out = model.generate(
            **batch, max_new_tokens=limit, do_sample=False, eos_token_id=sorted(stops),
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in stops), len(row))
            answers.append(row[:end])
    return answers


@torch.inference_mode()
def margin(model: Any, tokenizer: Any, text: str, first: list[int], second: list[int]) -> tuple[int, float]:
    """Where two answers part, and the logits' difference there of a run without padding or company."""
    place = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + first[:place]
    top = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2).values
    return place, float(top[0] - top[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch-size", default="auto", help="a number, or auto (measured, and its time counted)")
    options = parser.parse_args()
    checkpoint = base_model()
    model: Any = load_model(checkpoint, dtype="float32")
    tokenizer: Any = load_tokenizer(checkpoint)
    prompts, source = questions(options.questions)
    texts = [render(tokenizer, prompt) for prompt in prompts]
    size = options.batch_size if options.batch_size == "auto" else int(options.batch_size)
    complete(model, tokenizer, texts[:8], max_new_tokens=4, batch_size=8)
    with quiet():
        published(model, tokenizer, texts[:4], 4)
        start, busy = time.perf_counter(), time.process_time()
        theirs = published(model, tokenizer, texts, options.tokens)
        their_seconds, their_busy = time.perf_counter() - start, time.process_time() - busy
    start, busy = time.perf_counter(), time.process_time()
    ours = complete(model, tokenizer, texts, max_new_tokens=options.tokens, batch_size=size)
    our_seconds, our_busy = time.perf_counter() - start, time.process_time() - busy
    their_texts = tokenizer.batch_decode(theirs, skip_special_tokens=True)
    their_tokens = sum(map(len, theirs))
    our_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ours)
    print(f"{len(texts)} {source} questions, {options.tokens} new tokens, fp32, {torch.get_num_threads()} threads")
    print(f"model.generate, batch 4, unsorted: {their_seconds:.1f} s, {their_tokens / their_seconds:.1f} tokens/s")
    print(f"resafe, batch size {options.batch_size}: {our_seconds:.1f} s, {our_tokens / our_seconds:.1f} tokens/s")
    print(f"processor seconds: {their_busy:.1f} and {our_busy:.1f}; load average {os.getloadavg()[0]:.1f}")
    different = [place for place, (a, b) in enumerate(zip(ours, their_texts, strict=True)) if a != b]
    print(f"same texts: {len(texts) - len(different)} of {len(texts)}")
    for place in different:
        mine = tokenizer(ours[place], add_special_tokens=False)["input_ids"]
        at, gap = margin(model, tokenizer, texts[place], theirs[place], mine)
        print(f"  question {place}: part at token {at}, where the two best logits differ by {gap:.2g}")
    if options.json:
        figures = {
            "generation_speedup": (our_tokens / our_seconds) / (their_tokens / their_seconds),
            "generation_speedup_cpu": (our_tokens / our_busy) / (their_tokens / their_busy),
            "generation_tokens_per_second": our_tokens / our_seconds,
            "generate_tokens_per_second": their_tokens / their_seconds,
            "generation_same_texts": (len(texts) - len(different)) / len(texts),
        }
        sys.stdout.write(json.dumps({name: round(value, 4) for name, value in figures.items()}) + "\n")


if __name__ == "__main__":
    main()
