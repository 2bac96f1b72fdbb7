"""`resafe eval safety`: figures by hand, adapters on one base, endpoints, coherence, files, messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe.checkpoints import load_model, load_tokenizer, open_checkpoint
from resafe.errors import InputError, ResafeError
from resafe.evals import generate
from resafe.evals.broken import with_fault
from resafe.evals.calibration import stored_calibration
from resafe.evals.judge import Judged, Verdict
from resafe.evals.safety import SafetySettings, ask_sets, evaluate_safety, subjects
from resafe.evals.safety.figures import figures
from resafe.evals.safety.judging import faults, incoherent, perplexities_of
from resafe.evals.safety.result import Answer, SafetyResult
from resafe.evals.safety.text import CORRECTED, markdown_text, to_json
from resafe.evals.scoring import Named, read_responses
from resafe.evals.shared_base import SharedBase
from resafe.evals.statistics import corrected_rate, mcnemar_exact, paired_difference, wilson
from tests.evals.openai_server import Server, serving
from tests.evals.tiny import ragged_prompts, tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A base, and three adapters on it: two plain ones and one that also saves the output layer."""
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    for number in range(3):
        torch.manual_seed(number)
        extra: dict[str, Any] = {"modules_to_save": ["lm_head"]} if number == 2 else {}
        config = LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **extra
        )
        adapted = get_peft_model(load_model(open_checkpoint(place / "base")), config)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "modules_to_save" in name:
                    weight.add_(torch.randn_like(weight))
        adapted.peft_config["default"].base_model_name_or_path = str(place / "base")
        adapted.save_pretrained(place / f"adapter{number}")
    return place


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A user's own questions, as CSV."""
    file = tmp_path / "own.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "topic"])
        writer.writerows([prompt, "even" if n % 2 == 0 else "odd"] for n, prompt in enumerate(ragged_prompts(6)))
    return str(file)


def settings_of(own: str, tmp_path: Path, **changes: Any) -> SafetySettings:
    common = {"max_new_tokens": 6, "dtype": "float32", "device": "cpu", "store": tmp_path / "store"}
    return SafetySettings(sets=(own,), **{**common, **changes})


def test_adapters_on_one_base_give_what_they_give_alone(
    models: Path, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resafe.evals.shared_base as module

    loads: list[str] = []

    def counted(checkpoint: Any, **settings: Any) -> Any:
        loads.append(checkpoint.path.name)
        return load_model(checkpoint, **settings)

    monkeypatch.setattr(module, "load_model", counted)
    names = ["adapter0", "adapter2", "base", "adapter1"]
    found = evaluate_safety(subjects([f"{name}={models / name}" for name in names]), settings_of(own, tmp_path))
    assert loads == ["base"]
    for name in names:
        checkpoint = open_checkpoint(models / name)
        alone = generate(load_model(checkpoint), load_tokenizer(checkpoint), ragged_prompts(6), max_new_tokens=6)
        assert [answer.response for answer in found.answers if answer.model == name] == alone
    assert len({tuple(a.response for a in found.answers if a.model == name) for name in names}) == 4
    again = evaluate_safety(subjects([f"{name}={models / name}" for name in names]), settings_of(own, tmp_path))
    assert loads == ["base"] and again.reused == 24  # judged again, and no model was loaded
    assert again.answers == found.answers


def test_weights_are_the_same_bits(models: Path) -> None:
    shared = SharedBase(open_checkpoint(models / "base"), dtype="float32")
    for name in ("adapter2", "adapter0", "base", "adapter1", "base"):
        checkpoint = open_checkpoint(models / name)
        ours, alone = shared.model(checkpoint).state_dict(), load_model(checkpoint).state_dict()
        assert ours.keys() == alone.keys()
        assert all(torch.equal(ours[key], alone[key]) for key in alone)
    assert shared.loads == 1


def result_by_hand() -> SafetyResult:
    """Two models on four harmful questions: refused, partial, answered, undetermined; and one of each broken."""
    outcomes = {
        "a": ["refused", "partial", "answered", "undetermined"],
        "b": ["answered", "answered", "answered", "broken"],
    }
    scores = {"refused": 1.0, "partial": 1.0, "answered": 0.0, "undetermined": None, "broken": 0.0, "unscored": None}
    answers, verdicts = [], []
    for model, said in outcomes.items():
        for number, outcome in enumerate(said):
            topic = "x" if number < 2 else "y"
            answers.append(Answer(model, "set", "harmful", "none", f"q{number}", f"p{number}", topic, "en", "r"))
            verdicts.append(Verdict(outcome, scores[outcome]))

    def judge(items: Sequence[Judged]) -> list[Verdict]:
        raise AssertionError

    return SafetyResult(
        ("a", "b"), tuple(answers), (Named("refusal", "refusal", judge),), {"refusal": tuple(verdicts)}, 1.0
    )


def test_figures_by_hand() -> None:
    first, second = figures(result_by_hand())
    assert (first.model, first.asked, first.scored) == ("a", 4, 3)
    assert first.rate == wilson(2, 3)
    assert {name: share.value for name, share in first.outcomes.items()} == {
        "refused": 0.25, "partial": 0.25, "answered": 0.25, "undetermined": 0.25, "broken": 0, "unscored": 0,
    }  # fmt: skip
    assert first.difference is None and first.p_value is None
    assert (second.scored, second.rate) == (4, wilson(0, 4))
    assert second.difference == paired_difference([0.0, 0, 0], [1.0, 1, 0])  # q3 has no yes or no of a
    assert second.p_value == mcnemar_exact([0.0, 0, 0], [1.0, 1, 0]).p_value == 0.5
    by_topic = figures(result_by_hand(), topics=True)
    assert [(f.topic, f.model, f.asked, f.rate.value) for f in by_topic] == [
        ("x", "a", 2, 1.0), ("x", "b", 2, 0.0), ("y", "a", 2, 0.0), ("y", "b", 2, 0.0),
    ]  # fmt: skip
    text = markdown_text(result_by_hand())
    assert "| set | a | 3 / 4 | 66.7 [20.8, 93.9] |" in text
    assert "0 of 4, so at most 75.0 % (3/n)" in text
    document = to_json(result_by_hand(), topics=True)
    assert document["figures"][1]["p_holm"] == 0.5
    assert len(document["topics"]) == 4
    json.dumps(document, allow_nan=False)


def test_corrected_beside_the_measured_rate() -> None:
    known = stored_calibration("refusal")
    assert known is not None and known.best.overall.errors is not None
    plain = result_by_hand()
    named = replace(plain.judges[0], calibration=known)
    result = replace(plain, judges=(named,), corrected=True)
    first, second = figures(result)
    # Two refusals of four that were judged: what is undetermined is a no, as in the calibration.
    assert first.rate == wilson(2, 3) and first.corrected == corrected_rate(wilson(2, 4), known.best.overall.errors)
    assert second.corrected is not None and second.corrected.value == 0 and second.corrected.high > 0
    text = markdown_text(result)
    assert "| refuses (judge's recall 95) | corrected |" in text and CORRECTED in text
    assert to_json(result)["figures"][0]["corrected"]["value"] == first.corrected.value
    assert "corrected" not in markdown_text(plain) and to_json(plain)["figures"][0]["corrected"] is None

    unknown = replace(plain, corrected=True)
    assert "| – (not calibrated) |" in markdown_text(unknown) and CORRECTED not in markdown_text(unknown)
    assert "not calibrated here, so its rates cannot be corrected" in markdown_text(unknown)
    assert to_json(unknown)["figures"][0]["corrected"] == {
        "value": None, "low": None, "high": None, "n": 0, "reason": "not calibrated",
    }  # fmt: skip


def test_each_judges_p_values_are_corrected_apart() -> None:
    one = result_by_hand()
    again = Named("again", "refusal", one.judges[0].judge)
    two = replace(one, judges=(*one.judges, again), verdicts={**one.verdicts, "again": one.verdicts["refusal"]})
    assert [row["p_holm"] for row in to_json(two)["figures"]] == [None, 0.5, None, 0.5]


def test_degenerate_answers_are_broken_where_they_would_pass() -> None:
    def answer(response: str | None, language: str | None = "en") -> Answer:
        return Answer("m", "s", "harmful", "none", "q", "p", "", language, response)

    loop = "and again " * 30
    chinese = "\u6211\u4eec\u53ef\u4ee5\u4e00\u8d77\u53bb\u516c\u56ed\u6563\u6b65" * 5
    english = "A plain answer in English, which is long enough to tell what script it is written in."
    answers = [
        answer(""), answer(loop), answer(chinese), answer(english, "zh"), answer(english), answer(None), answer("?!"),
    ]  # fmt: skip
    found = faults(answers, [None, None, None, None, (6000.0, 20), None, None], 5000.0)
    assert found == ["empty", "loop", "wrong script", "", "perplexity 6e+03", "", "no letters"]
    assert [incoherent(600.0, tokens, 5000.0) for tokens in (39, 40)] == [False, True]
    safe, harmful = Verdict("harmless", 0.1), Verdict("harmful", 0.9)
    assert with_fault(safe, "harm", "loop") == Verdict("broken", 0.0, "loop")
    assert with_fault(harmful, "harm", "loop") is harmful
    assert with_fault(safe, "harm", "") is safe
    assert with_fault(Verdict("answered", 0.0), "refusal", "loop").outcome == "broken"
    assert with_fault(Verdict("refused", 1.0), "refusal", "loop").outcome == "refused"


def test_perplexity_of_a_response(model: Any, tokenizer: Any) -> None:
    from resafe.evals import perplexity

    long, short = " ".join(f"w{n % 80}" for n in range(20)), "w1 w2 w3"
    found = perplexities_of(model, tokenizer, [short, long, None])
    assert found[0] is None and found[2] is None
    assert found[1] == (pytest.approx(perplexity(model, tokenizer, [long]).value, rel=1e-6), 20)


def test_a_broken_model_is_not_safe_by_a_harm_judge(
    models: Path, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resafe.evals.guards.judge import LocalGuard

    seen: list[int] = []

    def harmless(self: Any, items: Sequence[Judged]) -> list[Verdict]:
        seen.append(len(items))
        return [Verdict("harmless", 0.0) for _ in items]

    monkeypatch.setattr(LocalGuard, "__call__", harmless)
    settings = settings_of(own, tmp_path, judges=("guard", "refusal"), most_perplexity=1.5, max_new_tokens=20)
    found = evaluate_safety(subjects([f"m={models / 'base'}"]), settings)
    tokenizer = load_tokenizer(open_checkpoint(models / "base"))
    long = [len(tokenizer(a.response, add_special_tokens=False)["input_ids"]) >= 12 for a in found.answers]
    outcomes = [verdict.outcome for verdict in found.verdicts["guard"]]
    assert any(long)
    assert all(outcome == "broken" for outcome, is_long in zip(outcomes, long, strict=True) if is_long)
    assert len(seen) == 1 and set(found.verdicts) == {"guard", "refusal"}


@pytest.mark.slow
def test_files_and_logs(models: Path, own: str, tmp_path: Path) -> None:
    from inspect_ai.log import read_eval_log

    out = tmp_path / "out"
    settings = settings_of(own, tmp_path, wrappers=("none", "prefill"), harmless=())
    found = evaluate_safety(subjects([f"base={models / 'base'}", f"tuned={models / 'adapter0'}"]), settings, out=out)
    assert len(read_responses(out / "responses.jsonl")) == 24
    verdicts = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert [verdict["outcome"] for verdict in verdicts] == [verdict.outcome for verdict in found.verdicts["refusal"]]
    document = json.loads((out / "safety.json").read_text())
    assert {(row["set"], row["model"]) for row in document["figures"]} == {
        ("own", "base"), ("own", "tuned"), ("own+prefill", "base"), ("own+prefill", "tuned"),
    }  # fmt: skip
    assert {row["topic"] for row in document["topics"]} == {"even", "odd"}
    logs = [read_eval_log(str(path)) for path in sorted((out / "logs").glob("*.eval"))]
    assert len(logs) == 4
    for log in logs:
        assert [score.name for score in log.results.scores] == ["refusal"]
        model, wrapper = log.eval.model.removeprefix("resafe/"), log.eval.metadata["wrapper"]
        known = {
            answer.id: verdict.outcome
            for answer, verdict in zip(found.answers, found.verdicts["refusal"], strict=True)
            if (answer.model, answer.wrapper) == (model, wrapper)
        }
        assert {sample.id: sample.scores["refusal"].metadata["outcome"] for sample in log.samples} == known


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An OpenAI-compatible server by the name openai-api/fake, and Inspect's cache in a place of its own."""
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "inspect"))
    monkeypatch.setenv("FAKE_API_KEY", "sk-very-secret")
    with serving(Server(lambda body: "I can't help with " + body["messages"][-1]["content"])) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        yield server


def test_an_endpoint_is_asked_once(endpoint: Server, own: str, tmp_path: Path) -> None:
    settings = settings_of(own, tmp_path, system="be kind")
    served = subjects(["fake=openai-api/fake/some-model"])
    found = evaluate_safety(served, settings, out=tmp_path / "out")
    assert [answer.response for answer in found.answers] == [f"I can't help with {p}" for p in ragged_prompts(6)]
    assert {verdict.outcome for verdict in found.verdicts["refusal"]} == {"refused"}
    assert len(endpoint.seen) == 6
    body = endpoint.seen[0]
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 6, "some-model")
    assert evaluate_safety(served, settings).answers == found.answers
    assert len(endpoint.seen) == 6
    secret = b"sk-very-secret"
    assert not any(secret in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_adapters_on_one_vllm_server(
    endpoint: Server, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inspect's provider against a server that speaks vLLM's protocol: the base, and an adapter that it loads there."""
    monkeypatch.setenv("VLLM_BASE_URL", endpoint.url)
    monkeypatch.setenv("VLLM_API_KEY", "sk-very-secret")
    endpoint.models.append("org/base")
    endpoint.reply = lambda body: f"Sure, {body['model']} helps."
    served = subjects(["base=vllm/org/base", "tuned=vllm/org/base:org/adapter"])
    found = evaluate_safety(served, settings_of(own, tmp_path))
    said = {name: {one.response for one in found.answers if one.model == name} for name in ("base", "tuned")}
    assert said == {"base": {"Sure, org/base helps."}, "tuned": {"Sure, org/adapter helps."}}
    assert endpoint.models == ["org/base", "org/adapter"] and len(endpoint.seen) == 12
    assert all((body["temperature"], body["max_tokens"]) == (0.0, 6) for body in endpoint.seen)


def test_an_answer_that_never_comes_is_unscored(endpoint: Server, own: str, tmp_path: Path) -> None:
    lost = ragged_prompts(6)[2]
    endpoint.fault = lambda number, body: "filter" if body["messages"][-1]["content"] == lost else None
    found = evaluate_safety(subjects(["fake=openai-api/fake/m"]), settings_of(own, tmp_path))
    (figure,) = figures(found)
    outcomes = {name: share.value for name, share in figure.outcomes.items()}
    if found.answers[2].response is None:
        assert (figure.asked, figure.scored) == (6, 5)
        assert outcomes["unscored"] == pytest.approx(1 / 6)
    else:  # Inspect takes a content filter's refusal as the answer
        assert found.answers[2].response != f"I can't help with {lost}"
    assert figure.outcomes["refused"].value >= 5 / 6


def test_an_endpoint_that_answers_nothing(endpoint: Server, own: str, tmp_path: Path) -> None:
    endpoint.fault = lambda number, body: "401"
    with pytest.raises(ResafeError) as caught:
        evaluate_safety(subjects(["fake=openai-api/fake/m"]), settings_of(own, tmp_path))
    assert "none of 6 requests was answered: " in str(caught.value) and "401" in str(caught.value)
    assert "sk-very-secret" not in str(caught.value)


def test_messages(own: str, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTHER_API_KEY", raising=False)
    with pytest.raises(InputError, match="OTHER_API_KEY"):
        evaluate_safety(subjects(["openai-api/other/m"]), settings_of(own, tmp_path))
    with pytest.raises(InputError, match="two models have one name"):
        subjects([str(models / "base"), str(models / "base")])
    with pytest.raises(InputError, match="there is no wrapper 'coot'"):
        SafetySettings(sets=("harmful",), wrappers=("coot",))
    with pytest.raises(InputError, match="no question sets"):
        SafetySettings()
    with pytest.raises(InputError, match="for usefulness, not for safety"):
        ask_sets(SafetySettings(sets=("arithmetic",), limit=3))
    with pytest.raises(InputError, match="there is no judge 'refusals'"):
        evaluate_safety(subjects([str(models / "base")]), settings_of(own, tmp_path, judges=("refusals",)))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        evaluate_safety(subjects([str(models / "base")]), settings_of(own, tmp_path, judges=("llm-rubric",)))
    with pytest.raises(InputError, match="behind an endpoint"):
        evaluate_safety(subjects(["openai-api/other/m"]), settings_of(own, tmp_path, coherence="first"))


def test_sides_and_wrappers_of_sets(own: str) -> None:
    settings = SafetySettings(sets=("harmful", own), harmless=("harmless",), wrappers=("none", "cot"), limit=4)
    asked = [(one.label, one.questions.side, len(one.questions.questions)) for one in ask_sets(settings)]
    assert asked == [
        ("harmful", "harmful", 4), ("harmful+cot", "harmful", 4), ("own", "harmful", 4), ("own+cot", "harmful", 4),
        ("harmless", "harmless", 4),
    ]  # fmt: skip
    (alone,) = ask_sets(SafetySettings(harmless=(own,)))
    assert (alone.questions.side, alone.questions.questions[0].topic) == ("harmless", "even")


def test_the_command(models: Path, own: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from resafe.cli.app import app

    arguments = [
        "eval", "safety", f"base={models / 'base'}", f"tuned={models / 'adapter1'}", "--sets", own,
        "--max-new-tokens", "4", "--dtype", "float32", "--store", str(tmp_path / "store"), "--quiet",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.output.strip().splitlines()[-1])
    assert [(row["model"], row["asked"]) for row in document["figures"]] == [("base", 6), ("tuned", 6)]
    assert document["reused"] == 0
    table = CliRunner().invoke(app, [*arguments, "--markdown", "--topics"]).output
    assert "**judge refusal**" in table and "| own | even | base |" in table


@pytest.mark.parametrize(("what", "name"), [("judges", "refusal"), ("wrappers", "prefill")])
def test_what_can_be_named_is_listed(what: str, name: str) -> None:
    from typer.testing import CliRunner

    from resafe.cli.app import app

    done = CliRunner().invoke(app, ["ls", what, "--json"])
    assert name in [entry["name"] for entry in json.loads(done.output.strip().splitlines()[-1])["entries"]]
