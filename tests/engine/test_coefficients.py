"""Coefficients by name and layer, worked by hand."""

from __future__ import annotations

import pytest

from resafe.engine import Coefficients
from resafe.engine.coefficients import layer_of
from resafe.errors import InputError

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up.weight" for i in range(5)), "lm_head.weight"]


def at(value, *names):
    found = Coefficients.of(value, NAMES, "weight of a")
    return [found.at(name) for name in names or NAMES]


def test_a_number_is_for_all():
    assert at(0.5) == [0.5] * 7


def test_a_gradient_runs_over_the_layers():
    assert at([0, 1]) == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert at([0, 1, 0]) == [0, 0, 0.5, 1, 0.5, 0, 0]
    assert at([2]) == [2] * 7


def test_patterns_come_in_order_and_default_last():
    value = {"default": 0.1, r"layers\.[01]\.": 3, "layers": [0, 4]}
    assert at(value) == [0.1, 3, 3, 2, 3, 4, 0.1]
    assert at({"head": 0.0}) == [1, 1, 1, 1, 1, 1, 0]  # what no rule names keeps 1


def test_from_a_file(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_text("mlp: [0, 1]\ndefault: 0.25\n")
    assert at(str(path)) == [0.25, 0, 0.25, 0.5, 0.75, 1, 0.25]
    with pytest.raises(InputError, match="cannot be read"):
        at(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "no number and no list"), ({"mlp": "x"}, "no number"), ({"mlp": True}, "no number"),
        ({"attn": 1}, "no tensor's name fits 'attn'"), ({"(": 1}, "no regular expression"),
    ],
)  # fmt: skip
def test_mistakes_are_named(value, message):
    with pytest.raises(InputError, match=message) as caught:
        at(value)
    assert "weight of a" in caught.value.message


def test_layer_numbers():
    assert layer_of("model.layers.12.self_attn.q_proj.weight") == 12
    assert layer_of("transformer.h.3.attn.weight") == 3
    assert layer_of("model.experts.7.weight") is None
