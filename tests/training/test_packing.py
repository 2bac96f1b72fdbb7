"""Packed rows: the losses and weights of padded ones, on several architectures; a leaking model is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from resafe.errors import InputError
from resafe.training import LoraSettings, SftSettings, train_sft
from resafe.training.packing import check_packing, packed_lengths
from resafe.training.sft import encode_examples

from .conftest import make_model
from .test_sft import EXAMPLES


def sliding_model() -> Any:
    """Every other layer sees the last four positions only."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**shape, num_hidden_layers=2, vocab_size=264, head_dim=16, sliding_window=4,
                         layer_types=["sliding_attention", "full_attention"])
    )  # fmt: skip


def state_model() -> Any:
    """Its layers carry a state along the row."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=4))


class Running(torch.nn.Module):
    """A state that runs along the row, and starts anew where `borders` names a new example; one of TRL's inputs."""

    def __init__(self, borders: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.borders = borders
        self.embedding, self.head = torch.nn.Embedding(264, 8), torch.nn.Linear(8, 264)

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def forward(self, input_ids: Any, position_ids: Any, use_cache: bool = False, **given: Any) -> Any:
        marks = {"seq_idx": lambda: given["seq_idx"][0],
                 "cu_seq_lens_q": lambda: torch.bucketize(torch.arange(input_ids.shape[1]), given["cu_seq_lens_q"][1:],
                                                          right=True)}  # fmt: skip
        example = marks[self.borders]() if self.borders else torch.zeros_like(input_ids[0])
        same = (example[:, None] == example[None, :]).tril().float()
        return SimpleNamespace(logits=self.head(same @ self.embedding(input_ids[0]))[None])


class Plain(torch.nn.Module):
    """A forward that knows tokens and nothing else."""

    get_input_embeddings = Running.get_input_embeddings

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(264, 264)

    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.embedding(input_ids))


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return dict(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "sliding"])
def test_every_examples_loss_is_the_one_it_has_alone(tokenizer: Any, kind: str) -> None:
    """Per example, and so that the answers of one example do not move when the example before it changes."""
    from resafe.training.head import install

    model = (sliding_model() if kind == "sliding" else make_model(kind=kind)).eval()
    rows, _ = encode_examples(tokenizer, EXAMPLES[:5], "", 512)
    alone = []
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        alone.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
    install(model)
    packed = collate(rows)
    output = model(**packed, use_cache=False, fused_lm_head=True)
    ends = [sum(packed_lengths(range(5), [len(row["input_ids"]) for row in rows], 1)[:n]) for n in range(6)]
    log_probs = torch.cat([torch.zeros(1), output.log_probs[0]])  # of each position's own token
    found = [-log_probs[start:end].sum().item() for start, end in itertools.pairwise(ends)]
    assert found == pytest.approx(alone, rel=1e-5)
    assert int(output.label_mask.sum()) == sum(label != -100 for row in rows for label in row["labels"])


def test_naive_packing_would_leak(tokenizer: Any) -> None:
    """What is avoided: without new positions the same row gives other losses, so the test above can fail."""
    rows, _ = encode_examples(tokenizer, EXAMPLES[:5], "", 512)
    model = make_model().eval()
    packed = collate(rows)
    ids, positions = packed["input_ids"], packed["position_ids"]
    apart = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    leaking = model(input_ids=ids, use_cache=False).logits
    first = len(rows[0]["input_ids"])
    assert torch.allclose(apart[0, :first], leaking[0, :first], atol=1e-5)
    assert (apart[0, first:] - leaking[0, first:]).abs().max() > 1e-2


@pytest.mark.parametrize("change", [{}, {"micro_batch_size": 2}, {"gradient_checkpointing": True}])
def test_a_packed_run_ends_with_the_weights_of_a_padded_one(
    tokenizer: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    results = []
    for packing in (False, True):
        settings = SftSettings(
            steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=0, device="cpu", packing=packing, **change
        )
        results.append(
            train_sft(
                model=make_model(), tokenizer=tokenizer, examples=EXAMPLES, settings=settings,
                out=tmp_path / str(packing), system="", lora=LoraSettings(rank=4),
            )
        )  # fmt: skip
    padded, packed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("False", "True"))
    assert results[1].losses == pytest.approx(results[0].losses, abs=2e-4)  # logs are rounded to 4 digits
    assert max((padded[name] - packed[name]).abs().max().item() for name in padded) < 1e-5
    assert results[0].tokens == results[1].tokens


def test_a_packed_run_is_padded_nowhere(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer.sft_trainer import SFTTrainer

    shapes: list[tuple[int, int]] = []
    plain = SFTTrainer.compute_loss

    def seen(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", seen)
    settings = SftSettings(steps=5, batch_size=4, device="cpu", packing=True)
    result = train_sft(
        model=make_model(), tokenizer=tokenizer, examples=EXAMPLES, settings=settings, out=tmp_path / "a", system=""
    )
    assert [rows for rows, _ in shapes] == [1] * 5
    assert sum(length for _, length in shapes) == result.tokens


def test_models_that_do_not_keep_examples_apart_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    first, second = list(range(3, 30)), list(range(40, 60))
    for kind in ("llama", "gemma2"):
        check_packing(make_model(kind=kind), first, second)
        check_packing(make_model(kind=kind).bfloat16(), first, second)  # rounding is no leak
    check_packing(sliding_model(), first, second)
    with pytest.raises(InputError, match="does not keep packed examples apart"):
        check_packing(state_model(), first, second)
    settings = SftSettings(steps=1, batch_size=2, device="cpu", packing=True)
    with pytest.raises(InputError, match="leave out packing"):
        train_sft(
            model=state_model(), tokenizer=tokenizer, examples=EXAMPLES, settings=settings, out=tmp_path / "a",
            system="",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("borders", ["seq_idx", "cu_seq_lens_q", None])
def test_the_trial_gives_what_training_gives(borders: str | None) -> None:
    """A layer with a state is let through if it honours the borders that TRL's collator names, and only then."""
    first, second = list(range(3, 30)), list(range(40, 60))
    model = Running(borders).train()
    if borders:
        check_packing(model, first, second)
    else:
        with pytest.raises(InputError, match=r"does not keep packed examples apart"):
            check_packing(model, first, second)
    assert model.training


def test_a_forward_without_borders_is_refused_not_crashed() -> None:
    with pytest.raises(InputError, match="does not take packed rows: .*position_ids"):
        check_packing(Plain(), [1, 2, 3], [4, 5])
