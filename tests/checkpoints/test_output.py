"""The output layer on chosen positions, against the logits of all of them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from resafe.checkpoints.output import output_of
from tests.evals.tiny import tiny_model


@pytest.mark.parametrize("adapter", [False, True])
def test_chosen_positions_have_their_own_logits(adapter: bool) -> None:
    model = tiny_model(initializer_range=0.2).eval()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    wanted = torch.tensor([[False, True, False, False], [True, False, False, True]])
    with torch.no_grad():
        everything = model(input_ids=ids).logits
        with output_of(model, lambda hidden: hidden[wanted]):
            chosen = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert chosen.shape == (1, 3, everything.shape[-1])
    torch.testing.assert_close(chosen[0], everything[wanted])
    assert torch.equal(after, everything)


def test_the_output_layer_is_itself_again_after_an_error() -> None:
    model = tiny_model()
    with pytest.raises(RuntimeError, match="stop"), output_of(model, lambda hidden: hidden[:, -1]):
        raise RuntimeError("stop")
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape[:2] == (1, 2)
