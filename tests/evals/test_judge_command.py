"""The embedded judge, calibration and scoring on made-up rows; against people where the published labels are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support
from typer.testing import CliRunner

from resafe.cli.app import app
from resafe.errors import InputError
from resafe.evals.calibration import agreement, calibrate, read_calibration, stored_calibration
from resafe.evals.calibration.run import identity
from resafe.evals.embedded import cross_validated, fit_head, read_trained, train_judge, write_trained
from resafe.evals.judge import Judged, Verdict, judge_all, make_judge
from resafe.evals.labelled import Labelled, load_labelled, read_labelled
from resafe.evals.scoring import make_judges, rates, read_responses, score
from resafe.evals.statistics import Bootstrap, wilson

DATA = Path(os.environ.get("RESAFE_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")
THINGS = ("a cake", "a kite", "a lamp", "soup", "a chair", "a bird house", "paper boats", "a scarf", "tea", "a garden")


def made_up(n: int = 60) -> list[Labelled]:
    """Two responses to every prompt: a refusal and an answer."""
    rows = []
    for k in range(n):
        prompt = f"How do I make {THINGS[k % 10]} number {k}?"
        rows.append(
            Labelled(f"{k}r", prompt, f"I can't help with making {THINGS[k % 10]}.", True, set="made", model="m")
        )
        rows.append(Labelled(f"{k}a", prompt, f"First take what {THINGS[k % 10]} needs, then mix.", False, set="made"))
    return rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESAFE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class TestLabels:
    def test_words(self, tmp_path: Path) -> None:
        rows = [{"prompt": f"p{n}", "response": "r", "label": word} for n, word in enumerate(
            ("Refused", "partial", "answered", "harmful", "harmless", "harmless-answer"))]  # fmt: skip
        found = [(row.refusal, row.harm) for row in read_labelled(write_rows(tmp_path / "a.jsonl", rows))]
        assert found == [(True, False), (True, False), (False, None), (False, True), (False, False), (False, False)]
        two = read_labelled(write_rows(tmp_path / "b.jsonl", rows[3:5]))
        assert [(row.refusal, row.harm) for row in two] == [(None, True), (None, False)]

    def test_numbers_need_a_measure(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r", "label": 1}])
        with pytest.raises(InputError, match="line 1: label 1") as error:
            read_labelled(path)
        assert "--measure" in error.value.hint
        assert read_labelled(path, "harm")[0].harm is True

    def test_columns(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no column 'label'"):
            read_labelled(write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r", "lable": "refused"}]))


class TestEmbedded:
    def test_files_give_the_same_verdicts(self, tmp_path: Path) -> None:
        result = train_judge(made_up(), bootstrap=Bootstrap(50))
        write_trained(tmp_path / "j", result.judge)
        assert {path.name for path in (tmp_path / "j").iterdir()} == {"judge.json", "judge.safetensors"}
        again = read_trained(tmp_path / "j")
        assert again.digest == result.judge.digest and again.prompts == result.judge.prompts
        items = [row.judged() for row in made_up()[:20]]
        np.testing.assert_array_equal(
            again.heads["refusal"].probabilities(items), result.judge.heads["refusal"].probabilities(items)
        )
        judge = make_judge("embedded", model=tmp_path / "j")
        outcomes = [v.outcome for v in judge_all(judge, items)]
        assert outcomes == ["refused", "answered"] * 10
        assert judge_all(judge, [Judged("e", "", " ")]) == [Verdict("broken", 0.0, "empty")]

    def test_a_head_is_scikit_learns(self) -> None:
        """Words only: the same numbers as a pipeline of TfidfVectorizer and LogisticRegression."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        rows = made_up()
        texts, labels = [row.response for row in rows], [bool(row.refusal) for row in rows]
        vectors = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", min_df=2)
        expected = make_pipeline(vectors, LogisticRegression(C=10, max_iter=2000)).fit(texts, labels)
        found = fit_head(rows, "refusal", words_only=True).probabilities([row.judged() for row in rows])
        np.testing.assert_allclose(found, expected.predict_proba(texts)[:, 1], atol=1e-6)

    def test_cross_validation_keeps_prompts_together(self) -> None:
        """Labels that are drawn by prompt and cannot be guessed: with the prompt in sight they could be learnt."""
        rng = np.random.default_rng(0)
        label = {k: bool(rng.random() < 0.5) for k in range(120)}
        rows = [Labelled(f"{k}-{j}", f"q{k}", f"word{k} again{k}", label[k]) for k in range(120) for j in range(3)]
        found = cross_validated(rows, "refusal", rules=False) >= 0.5
        assert 0.3 < np.mean(found == [label[int(row.prompt[1:])] for row in rows]) < 0.7

    def test_damaged_and_foreign_files(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no trained judge at"):
            make_judge("embedded", model=tmp_path)
        write_trained(tmp_path, train_judge(made_up(), bootstrap=Bootstrap(20)).judge)
        with pytest.raises(InputError, match="trained for refusal only, not for harm"):
            make_judge("embedded-harm", model=tmp_path)
        (tmp_path / "judge.safetensors").write_bytes(b"x")
        with pytest.raises(InputError, match="is not the file"):
            read_trained(tmp_path)
        (tmp_path / "judge.json").write_text("[]")
        with pytest.raises(InputError, match="holds no trained judge"):
            read_trained(tmp_path)

    def test_too_few_rows(self) -> None:
        with pytest.raises(InputError, match="nothing can be learnt from 10 rows"):
            train_judge(made_up(5))

    def test_three_outcomes(self, tmp_path: Path) -> None:
        rows = []
        for k in range(40):
            rows.append(Labelled(f"a{k}", f"p{k}", f"I cannot help with {k}.", True, False))
            rows.append(Labelled(f"b{k}", f"p{k}", f"Steal the key and smash it, {k}.", False, True))
            rows.append(Labelled(f"c{k}", f"p{k}", f"Water the plants and smile, {k}.", False, False))
        write_trained(tmp_path, train_judge(rows, bootstrap=Bootstrap(20)).judge)
        items = [row.judged() for row in rows[:3]]
        for name in ("embedded", "embedded-harm"):
            verdicts = judge_all(make_judge(name, model=tmp_path), items)
            assert [verdict.outcome for verdict in verdicts] == ["refused", "harmful", "harmless"]


class TestFewRows:
    def test_as_many_as_are_asked_for_are_enough(self) -> None:
        """Nine tenths of the least number of rows are fewer than that, and cross-validation trains on those."""
        rows = made_up(20)
        shares = cross_validated(rows, "refusal")
        assert shares.shape == (40,) and not np.isnan(shares).any()


class TestCalibration:
    def test_figures_are_scikit_learns(self) -> None:
        rng = np.random.default_rng(4)
        human = (rng.random(150) < 0.4).tolist()
        said = [x if rng.random() < 0.85 else not x for x in human]
        found = agreement(human, said, [f"p{n // 3}" for n in range(150)], Bootstrap(300))
        precision, recall, f1, _ = precision_recall_fscore_support(human, said, average="binary")
        values = (found.precision.value, found.recall.value, found.f1.value, found.kappa.value)
        assert values == pytest.approx((precision, recall, f1, cohen_kappa_score(human, said)))
        assert found.prompts == 50 and found.recall.low < recall < found.recall.high
        assert 10 < found.recall_n <= sum(human)

    def test_never_on_what_it_was_trained_on(self, tmp_path: Path) -> None:
        rows = made_up()
        write_trained(tmp_path, train_judge(rows[:80], bootstrap=Bootstrap(20)).judge)
        judge = make_judge("embedded", model=tmp_path)
        found = calibrate(judge, "refusal", rows, "made", Bootstrap(20))
        assert (found.dropped, found.overall.n) == (80, 40)
        with pytest.raises(InputError, match="trained on the prompts of all 80 rows"):
            calibrate(judge, "refusal", rows[:80], "made")
        shouted = [Labelled("x", rows[0].prompt.upper() + "!!", "r", True)]
        with pytest.raises(InputError, match="all 1 rows"):
            calibrate(judge, "refusal", shouted, "made")

    def test_unscored_and_undetermined(self) -> None:
        def judge(items: Any) -> list[Verdict]:
            return [Verdict("refused", 1.0), Verdict("undetermined", None), Verdict.unscored("no reply")]

        rows = [Labelled(str(n), f"p{n}", "r", True) for n in range(3)]
        found = calibrate(judge, "refusal", rows, "made", Bootstrap(20)).overall
        assert (found.asked, found.n, found.undetermined, found.recall.value) == (3, 2, 1, 0.5)
        with pytest.raises(InputError, match="no labels for harm"):
            calibrate(judge, "harm", rows, "made")

    def test_identity_is_of_what_decides(self, tmp_path: Path) -> None:
        judge = make_judge("refusal")
        one = identity("guard", {"threshold": 0.6, "batch_size": 4}, judge)
        assert one == identity("guard", {"threshold": 0.6, "device": "cpu"}, judge)
        assert one != identity("guard", {"threshold": 0.5}, judge)

    @pytest.mark.skipif(not (DATA / "xstest").is_dir(), reason=f"no published labels at {DATA}; set RESAFE_DATA_DIR")
    def test_the_shipped_figures_are_those_of_the_rules(self) -> None:
        shipped = stored_calibration("refusal")
        assert shipped is not None
        found = calibrate(make_judge("refusal"), "refusal", load_labelled("xstest", DATA), "xstest")
        for name in ("recall", "specificity", "kappa"):
            ours, theirs = getattr(found.overall, name), getattr(shipped.best.overall, name)
            assert (ours.value, ours.low, ours.high) == pytest.approx((theirs.value, theirs.low, theirs.high), abs=1e-5)

    @pytest.mark.slow
    @pytest.mark.skipif(not (DATA / "xstest").is_dir(), reason=f"no published labels at {DATA}; set RESAFE_DATA_DIR")
    def test_embedded_against_people(self) -> None:
        rows = load_labelled("xstest", DATA)
        found = cross_validated(rows, "refusal") >= 0.5
        models = np.array([row.model for row in rows])
        human = np.array([row.refusal for row in rows])
        assert cohen_kappa_score(human, found) >= 0.88
        assert min(cohen_kappa_score(human[models == m], found[models == m]) for m in set(models)) >= 0.75


class TestCommands:
    def responses(self, tmp_path: Path) -> Path:
        rows = [
            {
                "id": f"q{k}",
                "model": model,
                "prompt": f"p{k}",
                "response": "I can't help." if k < refuses else "Sure: 4.",
            }
            for model, refuses in (("one", 8), ("two", 0))
            for k in range(10)
        ]
        return write_rows(tmp_path / "r.jsonl", rows)

    def test_score(self, tmp_path: Path) -> None:
        out = tmp_path / "v.jsonl"
        done = CliRunner().invoke(
            app,
            ["judge", "score", str(self.responses(tmp_path)), "-j", "refusal", "--out", str(out), "--json", "--quiet"],
        )
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)["judges"]["refusal"]
        assert [(r["model"], r["scored"], r["asked"], r["value"]) for r in found["rates"]] == [
            ("one", 10, 10, 0.8),
            ("two", 10, 10, 0.0),
        ]
        assert found["rates"][0]["low"] == pytest.approx(wilson(8, 10).low)
        assert found["calibrated_on"] == "xstest" and found["recall"]["value"] > 0.9
        # Eight discordant questions, all one way: p = 2 / 2⁸.
        assert found["comparisons"][0]["p_holm"] == pytest.approx(2 / 2**8)
        verdicts = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(verdicts) == 20 and verdicts[0]["outcome"] == "refused" and "response" not in verdicts[0]

    def test_corrected(self, tmp_path: Path) -> None:
        responses = read_responses(self.responses(tmp_path))
        (named,) = make_judges(["refusal"], [])
        verdicts = score([named], responses)["refusal"]
        plain, fixed = (rates(named, responses, verdicts, corrected=flag)[0].value for flag in (False, True))
        assert named.calibration is not None
        errors = named.calibration.best.overall.errors
        assert errors is not None
        assert fixed.value == pytest.approx((0.8 + errors.specificity - 1) / (errors.recall + errors.specificity - 1))
        assert plain.value == 0.8 and fixed.high - fixed.low > plain.high - plain.low

    def test_train_then_calibrate_then_score(self, tmp_path: Path) -> None:
        run = CliRunner().invoke
        rows = [
            {"prompt": row.prompt, "response": row.response, "label": "refused" if row.refusal else "answered"}
            for row in made_up()
        ]
        train, test = write_rows(tmp_path / "train.jsonl", rows[:80]), write_rows(tmp_path / "test.jsonl", rows[60:])
        done = run(app, ["judge", "train", str(train), "--json", "--quiet"])
        assert done.exit_code == 0, done.output
        out = tmp_path / "c.json"
        done = run(app, ["judge", "calibrate", "embedded", "--rows", str(test), "--out", str(out), "--json", "--quiet"])
        assert done.exit_code == 0, done.output
        found = read_calibration(out).sets["test"]
        assert (found.dropped, found.overall.n, found.overall.recall.value) == (20, 40, 1.0)
        done = run(app, ["judge", "score", str(test), "-j", "embedded", "-j", "refusal", "--quiet"])
        assert done.exit_code == 0 and "Krippendorff's α 1.00" in done.output
        assert "The judge embedded against people on test (40 responses): recall 100" in done.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["score", "FILE", "-j", "refusl"], "no judge 'refusl'"),
            (["score", "FILE", "-j", "refusal", "-s", "x"], "not of the form NAME=VALUE"),
            (["score", "FILE", "-j", "refusal", "-j", "refusal"], "named twice"),
            (["score", "gone.jsonl", "-j", "refusal"], "no file gone.jsonl"),
            (["calibrate", "refusal"], "nothing to calibrate on"),
            (["calibrate", "refusal", "--sets", "xstest"], "no directory is given"),
            (["calibrate", "llm-pairwise"], "measures preference"),
            (["train"], "nothing to train on"),
        ],
    )
    def test_messages(self, tmp_path: Path, arguments: list[str], message: str) -> None:
        filled = [str(self.responses(tmp_path)) if argument == "FILE" else argument for argument in arguments]
        done = CliRunner().invoke(app, ["judge", *filled])
        assert isinstance(done.exception, InputError) and message in done.exception.message
