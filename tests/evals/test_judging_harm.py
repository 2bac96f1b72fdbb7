"""What the embedded judge of harm sees beside words: the lexicon's signs and a local model's hidden states."""

from __future__ import annotations

import json
from math import log1p, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from resafe.errors import InputError
from resafe.evals.embedded import LocalModel, cross_validated, fit_head, read_trained, train_judge, write_trained
from resafe.evals.embedded.dense import Standard
from resafe.evals.embedded.lexicon import CLASSES, SIGNS, signs
from resafe.evals.judge import Judged, judge_all, make_judge
from resafe.evals.labelled import Labelled
from resafe.evals.statistics import Bootstrap
from tests.evals.tiny import WORDS, tiny_model, tiny_tokenizer

HIDDEN = ("undetected", "secretly", "unnoticed", "disguised", "stolen", "counterfeit", "anonymous", "suspicious")
OPEN = ("respectful", "consent", "honestly", "responsible", "safely", "polite", "protected", "permission")


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A tiny random model on disk, with its tokenizer."""
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def rows(words: tuple[str, ...], harm: bool, count: int = 6) -> list[Labelled]:
    name = "bad" if harm else "good"
    return [
        Labelled(f"{name}{word}{n}", f"question {n}", f"Paint it {word}.", None, harm, set="made")
        for word in words
        for n in range(count)
    ]


class TestSigns:
    def test_by_hand(self) -> None:
        """Twelve words, two of them of the class of law, one of care."""
        text = "It is illegal. Stay safe, and ask what the law says about it"
        found = signs([Judged("1", "Is it allowed, this thing?", text)])[0]
        names = list(CLASSES)
        assert found.shape == (SIGNS,) == (len(names) * 2 + 6 + 5 + 13,)
        length = 13
        assert found[names.index("law")] == pytest.approx(3 * sqrt(2 / length))
        assert found[names.index("care")] == pytest.approx(3 * sqrt(1 / length))
        assert found[len(names) + names.index("law")] == 0.5 and found[len(names) + names.index("sex")] == 0
        openings, closing, shape = np.split(found[2 * len(names) :], [6, 11])
        assert openings.tolist() == [0, 0, 0, 1, 0, 0]
        assert closing.tolist() == [0, 0.5, 0, 0, 0]  # the law is in the second half
        assert shape[:3] == pytest.approx([log1p(length) / 4, log1p(1), log1p(length) / 3])
        assert shape[6:10] == pytest.approx([0, log1p(2) / 3, 1, 0])  # no full stop; "allowed", "thing"; a question

    def test_empty_and_typographic(self) -> None:
        assert np.isfinite(signs([Judged("1", "", "")])).all()
        assert signs([]).shape == (0, SIGNS)
        curly, straight = signs([Judged("1", "p", "I can’t do it."), Judged("2", "p", "I can't do it.")])
        np.testing.assert_array_equal(curly, straight)

    def test_a_class_speaks_for_words_never_seen(self) -> None:
        """Trained on half of two classes' words, judged on the other half: words alone can only guess."""
        train = [*rows(HIDDEN[:4], True), *rows(OPEN[:4], False)]
        test = [*rows(HIDDEN[4:], True, 1), *rows(OPEN[4:], False, 1)]
        items, labels = [row.judged() for row in test], [row.harm for row in test]
        assert roc_auc_score(labels, fit_head(train, "harm").probabilities(items)) == 1.0
        assert roc_auc_score(labels, fit_head(train, "harm", words_only=True).probabilities(items)) == 0.5

    def test_refusals_have_none(self) -> None:
        made = [Labelled(str(n), f"p{n}", f"no {n}" if n % 2 else f"yes {n}", bool(n % 2)) for n in range(60)]
        assert fit_head(made, "refusal").signs is None


def test_standard_is_scikit_learns() -> None:
    values = np.random.default_rng(0).normal(3, 5, (40, 7))
    values[:, 2] = 4.0
    found = Standard.fit(values, 0.5)(values)
    np.testing.assert_allclose(found, 0.5 * StandardScaler().fit_transform(values), atol=1e-12)


class TestLocal:
    def items(self) -> list[Judged]:
        return [Judged(str(n), f"w{n} w{n + 1}", " ".join(WORDS[n : 2 * n])) for n in range(9)]

    def test_states_are_the_whole_models(self, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """One text at a time through all layers gives the same as batches through the first two."""
        monkeypatch.setattr("resafe.checkpoints.precision._cpu_multiplies_bfloat16", lambda: False)
        local = LocalModel.open(tiny)
        assert local.layer == 2
        found = local.states(self.items())
        model, tokenizer = tiny_model(num_hidden_layers=4), tiny_tokenizer()
        assert found.shape == (9, 32) and not found[0].any()
        for n, item in enumerate(self.items()[1:], 1):
            question = tokenizer(f"Question: {item.prompt}").input_ids
            framed = [*tokenizer("Question: ").input_ids, *tokenizer(item.prompt).input_ids]
            framed += tokenizer("\nAnswer: ").input_ids
            assert question == framed[: len(question)]
            ids = torch.tensor([[*framed, *tokenizer(item.response).input_ids]])
            with torch.no_grad():
                states = model(ids, output_hidden_states=True).hidden_states[2][0, len(framed) :]
            np.testing.assert_allclose(found[n], states.mean(0).numpy(), rtol=1e-4, atol=1e-4)

    def test_trained_stored_and_judged(self, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RESAFE_CACHE", str(tmp_path / "cache"))
        made = [
            Labelled(f"{n}{harm}", f"w{n}", f"{WORDS[n % 40 + 45 * harm]} {WORDS[n % 7]}", None, harm, set="made")
            for n in range(60)
            for harm in (True, False)
        ]
        said: list[str] = []
        result = train_judge(made, local=LocalModel.open(tiny), bootstrap=Bootstrap(20), say=said.append)
        head = result.judge.heads["harm"]
        assert head.states is not None and head.states.centre.shape == (32,)
        assert len(head.weights) == sum(len(w.vocabulary) for w in head.words) + 13 + SIGNS + 32
        assert any("first 2 layers" in line for line in said) and said[-1] == "  120 of 120"
        write_trained(tmp_path / "j", result.judge)
        again = read_trained(tmp_path / "j")
        assert again.digest == result.judge.digest
        items = [row.judged() for row in made[:10]]
        expected = head.probabilities(items, head.local.states(items) if head.local else None)
        found = [verdict.score for verdict in judge_all(make_judge("embedded-harm", model=tmp_path / "j"), items)]
        assert found == pytest.approx(expected, abs=1e-6)
        plain = train_judge(made, bootstrap=Bootstrap(20)).judge
        assert plain.digest != result.judge.digest and plain.heads["harm"].local is None

    def test_cross_validation_takes_states_at_hand(self) -> None:
        """Columns that all hold the label: what is given is used, row by row."""
        made = [Labelled(str(n), f"p{n}", "the same", None, bool(n % 2)) for n in range(80)]
        states = np.array([[float(row.harm or 0)] * 500 for row in made])
        local = LocalModel("nowhere", "", 1)
        found = cross_validated(made, "harm", local=local, states=states)
        assert roc_auc_score([row.harm for row in made], found) == 1.0

    def test_messages(self, tiny: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="layer 9 of 4"):
            LocalModel.open(tiny, 9)
        with pytest.raises(InputError, match="not the model that the judge was trained with"):
            LocalModel(tiny, "another", 2).states(self.items())
        refusals = [Labelled(str(n), f"p{n}", f"no {n}" if n % 2 else f"yes {n}", bool(n % 2)) for n in range(60)]
        with pytest.raises(InputError, match="too few labels"):
            train_judge(refusals, local=LocalModel(tiny, "", 2), bootstrap=Bootstrap(20))


def test_judges_of_the_first_format_are_read(tmp_path: Path) -> None:
    made = [Labelled(str(n), f"p{n}", f"no {n}" if n % 2 else f"yes {n}", bool(n % 2)) for n in range(60)]
    write_trained(tmp_path, train_judge(made, bootstrap=Bootstrap(20)).judge)
    document = json.loads((tmp_path / "judge.json").read_text())
    assert document["format"] == 2 and set(document["heads"]["refusal"]) == {"rules", "blocks"}
    for number, known in ((1, True), (3, False)):
        (tmp_path / "judge.json").write_text(json.dumps({**document, "format": number}))
        if known:
            assert read_trained(tmp_path).heads["refusal"].signs is None
        else:
            with pytest.raises(InputError, match="format 3"):
                read_trained(tmp_path)
