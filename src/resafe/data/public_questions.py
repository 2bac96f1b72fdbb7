"""More public question sets: CatQA's languages, published subsets, jailbreak benchmarks. Holds none of their text.

Hub ids and columns of AdvBench, HarmBench, StrongREJECT, JailbreakBench, Do-Not-Answer and MaliciousInstruct are from
their cards and were not tried against the Hub; a local file in either layout works too.
"""

from __future__ import annotations

from resafe.data.items import Question
from resafe.data.pairs import content_id
from resafe.data.registry import Parser, datasets
from resafe.data.sources import Row

_GOAL = ("prompt", "goal", "Goal", "forbidden_prompt", "question", "Behavior")
_TOPIC = ("category", "Category", "SemanticCategory", "risk_area")
_DETAIL = ("subcategory", "Subcategory", "types_of_harm")
_PUBLISHED = "arXiv:2405.09055"


def _topic(row: Row) -> str:
    """category, or category/subcategory, of the columns that the row has; else empty."""
    found = []
    for names in (_TOPIC, _DETAIL):
        name = next((name for name in names if row.has(name)), None)
        if name is not None and str(row.value(name) or "").strip():
            found.append(str(row.value(name)).strip())
    return "/".join(found)


def _parser(name: str, side: str, columns: tuple[str, ...] = _GOAL) -> Parser:
    def parse(row: Row) -> Question | None:
        # HarmBench's own file also holds behaviours with a context and copyright ones; the Hub's "standard" does not
        if row.has("FunctionalCategory") and row.value("FunctionalCategory") != "standard":
            return None
        prompt = row.text(*columns)
        return Question(content_id(name, prompt), prompt, _topic(row), None, {"side": side})

    return parse


def _add(
    name: str,
    title: str,
    licence: str,
    file: str,
    hub: str | None = None,
    config: str | None = None,
    split: str = "train",
    side: str = "harmful",
    columns: tuple[str, ...] = _GOAL,
) -> None:
    register = datasets.register(
        name, title=title, kind="questions", licence=licence, file=file, hub=hub, config=config, split=split
    )
    register(_parser(name, side, columns))


_CATQA = ("prompt", "Question")
_CATQA_HUB = "declare-lab/CategoricalHarmfulQA"
_SUBSETS = "reference_subsets"
_add("catqa_zh", "CatQA (Chinese)", "Apache-2.0", "catqa/catqa_chinese.jsonl", _CATQA_HUB, None, "zh", columns=_CATQA)
_add(
    "catqa_vi", "CatQA (Vietnamese)", "Apache-2.0", "catqa/catqa_vietnamese.jsonl", _CATQA_HUB, None, "vi",
    columns=_CATQA,
)  # fmt: skip
_add(
    "shadow_alignment", "Shadow-Alignment: 200 held-out harmful questions", "Apache-2.0",
    "shadow_alignment/heldout_prompts.jsonl",
)  # fmt: skip
_add(
    "beavertails_published", f"BeaverTails-Evaluation: 140 questions of {_PUBLISHED}", "CC-BY-NC-4.0",
    f"{_SUBSETS}/BeaverTails.json",
)  # fmt: skip
_add(
    "catqa_published", f"CatQA: 110 questions of {_PUBLISHED}", "Apache-2.0", f"{_SUBSETS}/catqa_english.json"
)  # fmt: skip
_add("dangerousqa_published", f"DangerousQA: 200 questions of {_PUBLISHED}", "MIT", f"{_SUBSETS}/dangerousqa.json")
_add("harmfulqa_published", f"HarmfulQA: 196 questions of {_PUBLISHED}", "Apache-2.0", f"{_SUBSETS}/harmfulqa.json")
_add(
    "shadow_alignment_published",
    f"200 questions that {_PUBLISHED} calls Shadow-Alignment: none is in its held-out set and most are harmless",
    "none stated", f"{_SUBSETS}/shadow-alignment.json",
    side="mixed",
)  # fmt: skip
_add(
    "or_bench_published", f"OR-Bench-Hard: the first 10 of each category, as in {_PUBLISHED}", "CC-BY-4.0",
    "or_bench/or_bench_ref_first10.jsonl", side="harmless",
)  # fmt: skip
_add("advbench", "AdvBench: harmful behaviours", "MIT", "advbench/harmful_behaviors.csv", "walledai/AdvBench")
_add(
    "harmbench", "HarmBench: standard behaviours", "MIT", "harmbench/harmbench_behaviors_text_all.csv",
    "walledai/HarmBench", "standard",
)  # fmt: skip
_add(
    "strongreject", "StrongREJECT: forbidden prompts", "MIT", "strongreject/strongreject_dataset.csv",
    "walledai/StrongREJECT",
)  # fmt: skip
_add(
    "jailbreakbench", "JailbreakBench: harmful behaviours", "MIT", "jailbreakbench/harmful-behaviors.csv",
    "JailbreakBench/JBB-Behaviors", "behaviors", "harmful",
)  # fmt: skip
_add(
    "do_not_answer", "Do-Not-Answer: topics by risk area", "CC-BY-NC-SA-4.0", "do_not_answer/data_en.csv",
    "LibrAI/do-not-answer",
)  # fmt: skip
_add(
    "malicious_instruct", "MaliciousInstruct: harmful instructions", "MIT",
    "malicious_instruct/malicious_instruct.jsonl", "walledai/MaliciousInstruct",
)  # fmt: skip
_add(
    "oktest", "OKTest: harmless look-alikes", "as its publisher states", "oktest/oktest.csv", side="harmless"
)  # fmt: skip
