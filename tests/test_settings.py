"""NAME=VALUE settings of a command line."""

import pytest

from resafe.errors import InputError
from resafe.settings import named_values


def test_values_are_read_as_yaml():
    given = ["rate=1e-5", "steps=3", "names=[a, b]", "loss=sft", "on=true", "none=null", " spaced = 2"]
    assert named_values(given, "--set") == {
        "rate": 1e-5, "steps": 3, "names": ("a", "b"), "loss": "sft", "on": True, "none": None, "spaced": 2
    }  # fmt: skip
    assert named_values(None, "--set") == {}


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("steps", "--set steps is not of the form NAME=VALUE"),
        ("=3", "--set =3 is not of the form NAME=VALUE"),
        ("shares={a: 1", "--set shares={a: 1: its value cannot be read"),
    ],
)
def test_another_form_is_told(item, told):
    with pytest.raises(InputError) as error:
        named_values([item], "--set")
    assert str(error.value).startswith(told)
