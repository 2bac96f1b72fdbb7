"""What a recipe says of the rows that it trains on."""

from __future__ import annotations

import json
from pathlib import Path

from resafe.recipe.context import Context
from resafe.recipe.load import check_recipe
from resafe.recipe.reporter import Silent
from resafe.recipe.stage import Run


def test_a_recipe_accounts_for_its_rows(tmp_path: Path) -> None:
    step = {"steps": 1, "learning_rate": 1e-3}
    tuned = tmp_path / "tuned.jsonl"
    asked = [{"prompt": f"q{n}", "response": "a"} for n in range(4)]
    tuned.write_text("\n".join(map(json.dumps, [*asked, {"prompt": "r", "response": ""}])))
    pairs = tmp_path / "pairs.jsonl"
    good = [json.dumps({"prompt": f"ask {n}?", "chosen": "no", "rejected": "yes"}) for n in range(9)]
    pairs.write_text("\n".join([*good, "{"]))
    fields = {
        "name": "own", "model": {"reference": "nowhere"},
        "data": {"safety": [str(pairs)], "max_bad_share": 0.2},
        "align": {"sft": step}, "tune": {"own": {"task": str(tuned), "measured_by": ["copa"], **step}},
        "utility": {"tasks": ["copa"]},
        "realign": {"half": {"method": "interpolation", "tuned": ["own"], "strength": 0.5}},
    }  # fmt: skip
    made = Context(check_recipe(fields, "test"), Run(tmp_path / "run", lambda line: None), Silent())
    assert len(made.mix("own")) == 4
    account = made.account()
    (source,) = account["align"]["sources"]
    assert (source["rows"], source["kept"], source["bad"]) == (10, 9, {"wrong schema": 1})
    part = account["tune"][str(tuned)]
    assert part["sources"][0]["bad"] == {"empty": 1} and part["overlap"]["dropped"] == 0
    assert part["overlap"]["not_at_hand"]["copa"] == "no file of it was given, and the Hub was not asked"
    assert made.left_out() == [
        f"{pairs}: 1 of 10 rows left out, see data.json",
        f"{tuned}: 1 of 5 rows left out, see data.json",
    ]
