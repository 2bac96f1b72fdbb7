"""Models with other vocabularies: rows matched by token string, against matrices put together by hand."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

import resafe
from resafe.checkpoints import open_checkpoint
from resafe.checkpoints.vocabulary import read_vocabulary
from resafe.engine import Input, Request, build_plan, execute, spans
from resafe.engine.matching import _padded
from resafe.engine.vocabulary import gathered
from resafe.errors import InputError
from resafe.masks import Mask, MaskSettings
from tests.evals.tiny import tiny_model, tiny_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(path, added=(), rows=None, seed=0, order=None, tokenizer=None, **config):
    """A tiny model whose tokenizer has more tokens; `order` permutes the ids of the ordinary words."""
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=t[0] == "<", normalized=t[0] != "<") for t in added])
    model = tiny_model(**config)
    model.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    found = open_checkpoint(path)
    return {name: found.read(name).clone() for name in found.tensors}


def permuted():
    """The tiny tokenizer with the words' ids in another order."""
    text = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = text["model"]["vocab"]
    words = [t for t in vocabulary if t.startswith("w")]
    ids = [vocabulary[t] for t in words]
    vocabulary.update(dict(zip(words, ids[::-1], strict=True)))
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(text))
    return tokenizer


def fuse(root, names, out="out", **changes):
    given = tuple(Input(str(root / name), name, weight) for name, weight in names.items())
    changes = {"vocabulary": "extend", **changes}
    plan = build_plan(Request(str(root / "base"), given, root / out, **changes), root / "cache")
    assert execute(plan, threads=2).committed
    found = open_checkpoint(root / out)
    return {name: found.read(name) for name in found.tensors}, plan


@pytest.fixture
def three(tmp_path, monkeypatch):
    """A base, a model with two more tokens, and one with two more, one of them shared, and padded to 104 rows."""
    monkeypatch.setattr(spans, "PIECE", 5 * 32)
    base = save(tmp_path / "base")
    one = save(tmp_path / "one", ("<tool>", "kiwi"), seed=1)
    two = save(tmp_path / "two", ("plum", "kiwi"), rows=104, seed=2)
    return tmp_path, base, one, two


def test_rows_by_hand(three):
    root, base, one, two = three
    assert (base[EMBEDDING].shape[0], one[EMBEDDING].shape[0], two[EMBEDDING].shape[0]) == (97, 99, 104)
    found, plan = fuse(root, {"one": 0.5, "two": 0.25})
    for name in (EMBEDDING, HEAD):
        a, b, c = base[name], one[name], two[name]
        known = a + 0.5 * (b[:97] - a) + 0.25 * (c[:97] - a)
        # <tool> is 97 in one; kiwi is 98 in both; plum is 97 in two
        wanted = torch.cat([known, b[97:98], (b[98:99] + c[98:99]) / 2, c[97:98]])
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-6)
    layer = "model.layers.1.mlp.up_proj.weight"
    wanted = base[layer] + 0.5 * (one[layer] - base[layer]) + 0.25 * (two[layer] - base[layer])
    torch.testing.assert_close(found[layer], wanted, rtol=1e-6, atol=1e-6)
    assert "one: 97 tokens shared with the base, 2 new, 0 missing" in plan.notes
    assert "two: 97 tokens shared with the base, 2 new, 0 missing" in plan.notes
    assert plan.notes[-1].endswith(
        "100 rows of vocabulary: the base's 97 tokens and 3 new ones, 1 of them means over several models"
    )


def test_what_is_written_works(three):
    root, *_ = three
    fuse(root, {"one": 0.5, "two": 0.25})
    tokenizer = AutoTokenizer.from_pretrained(root / "out")
    assert tokenizer.convert_tokens_to_ids(["w3", "<tool>", "kiwi", "plum"]) == [10, 97, 98, 99]
    for name in ("one", "two"):
        text = "w1 kiwi w2<tool> w4" if name == "one" else "w1 plum w2 kiwi w4"
        theirs = AutoTokenizer.from_pretrained(root / name)
        assert theirs.tokenize(text) == tokenizer.tokenize(text)
    assert tokenizer.decode([10, 97, 98], skip_special_tokens=True) == "w3 kiwi"  # <tool> is still a special one
    base = AutoTokenizer.from_pretrained(root / "base")
    assert (tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token) == (
        base.chat_template, base.eos_token, base.pad_token,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(root / "out")
    assert model.config.vocab_size == 100
    assert model(**tokenizer("w1 kiwi <tool>", return_tensors="pt")).logits.shape[-1] == 100
    assert "2 that tuned" not in (root / "out" / "README.md").read_text()
    assert "and 3 that tuned models added" in (root / "out" / "README.md").read_text()


def test_ids_in_another_order(tmp_path):
    base = save(tmp_path / "base")
    moved = save(tmp_path / "moved", tokenizer=permuted(), seed=1)
    assert base[EMBEDDING].shape == moved[EMBEDDING].shape  # the shapes alone would not tell
    found, plan = fuse(tmp_path, {"moved": 1.0})
    special = 7
    wanted = torch.cat([moved[EMBEDDING][:special], moved[EMBEDDING][special:].flip(0)])
    torch.testing.assert_close(found[EMBEDDING], wanted, rtol=1e-6, atol=1e-6)
    assert "moved: 97 tokens shared with the base, 0 new, 0 missing" in plan.notes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 97


def test_new_tokens_take_padding_rows_first(tmp_path):
    base = save(tmp_path / "base", rows=99)
    one = save(tmp_path / "one", ("<tool>",), rows=98, seed=1)
    found, _ = fuse(tmp_path, {"one": 1.0})
    wanted = torch.cat([one[EMBEDDING], base[EMBEDDING][98:]])  # the base's last padding row stays
    torch.testing.assert_close(found[EMBEDDING], wanted, rtol=1e-6, atol=1e-6)
    assert _padded(90, 99, 97) == 99
    assert _padded(105, 104, 97) == 112  # 104 was a multiple of 8
    assert _padded(105, 104, 104) == 105  # and here no padding
    assert _padded(2049, 2048, 2000) == 2560  # of 512 at most


def test_tokens_that_only_the_base_has_keep_its_rows(tmp_path):
    base = save(tmp_path / "base", ("<tool>",))
    one = save(tmp_path / "one", ("kiwi",), seed=1)
    found, plan = fuse(tmp_path, {"one": 1.0})
    wanted = torch.cat([one[EMBEDDING][:97], base[EMBEDDING][97:], one[EMBEDDING][97:]])
    torch.testing.assert_close(found[EMBEDDING], wanted, rtol=1e-6, atol=1e-6)
    assert "one: 97 tokens shared with the base, 1 new, 1 missing" in plan.notes


@pytest.mark.parametrize("method", ["average", "ties", "slerp", "dare"])
def test_other_methods(three, method):
    root, base, one, two = three
    found, _ = fuse(root, {"one": 1.0, "two": 1.0}, method=method)
    head = found[HEAD]
    assert head.shape == (100, 32)
    fresh = torch.cat([one[HEAD][97:98], (one[HEAD][98:99] + two[HEAD][98:99]) / 2, two[HEAD][97:98]])
    torch.testing.assert_close(head[97:], fresh, rtol=1e-5, atol=1e-6)
    if method == "average":
        torch.testing.assert_close(head[:97], (one[HEAD][:97] + two[HEAD][:97]) / 2, rtol=1e-6, atol=1e-6)
    assert not torch.equal(head[:97], base[HEAD])


def test_a_tied_model_on_a_base_that_stores_its_head(tmp_path):
    save(tmp_path / "base")
    tied = save(tmp_path / "tied", ("kiwi",), seed=1, tie_word_embeddings=True)
    assert HEAD not in tied
    found, _ = fuse(tmp_path, {"tied": 1.0})
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(found[name], tied[EMBEDDING], rtol=1e-6, atol=1e-6)


def test_an_adapter_beside_a_model_with_more_tokens(three, lab):
    root, base, one, _ = three
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), config)
    model.save_pretrained(root / "adapter")
    merged = model.merge_and_unload().state_dict()[HEAD]
    found, _ = fuse(root, {"one": 0.5, "adapter": 1.0})
    wanted = torch.cat([merged + 0.5 * (one[HEAD][:97] - base[HEAD]), one[HEAD][97:]])
    torch.testing.assert_close(found[HEAD], wanted, rtol=1e-5, atol=1e-5)


def test_biases_of_the_head_follow(tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path / "base")
    save(tmp_path / "one", ("kiwi",), seed=1)
    for name, rows in (("base", 97), ("one", 98)):
        path = tmp_path / name / "model.safetensors"
        save_file(load_file(path) | {"lm_head.bias": torch.arange(rows) * (1.0 if name == "base" else 2.0)}, path)
    found, _ = fuse(tmp_path, {"one": 0.5})
    wanted = torch.cat([torch.arange(97) * 1.5, torch.tensor([194.0])])
    torch.testing.assert_close(found["lm_head.bias"], wanted)


def test_the_same_vocabulary_needs_no_matching(tmp_path):
    save(tmp_path / "base")
    save(tmp_path / "one", seed=1)
    plain, _ = fuse(tmp_path, {"one": 0.5}, out="plain", vocabulary="refuse")
    found, plan = fuse(tmp_path, {"one": 0.5})
    assert plan.extended is None
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


def refused(root, names, **changes):
    with pytest.raises(InputError) as caught:
        fuse(root, dict.fromkeys(names, 1.0), **changes)
    assert not (root / "out").exists()
    return str(caught.value)


def test_refusals(tmp_path):
    save(tmp_path / "base")
    save(tmp_path / "more", ("kiwi",))
    text = refused(tmp_path, ["more"], vocabulary="refuse")
    assert "vocabulary: 97 against 98" in text and "with vocabulary: extend" in text
    words = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    words["model"]["vocab"]["kiwi"] = 97
    ordinary = tiny_tokenizer()
    ordinary._tokenizer = Tokenizer.from_str(json.dumps(words))
    save(tmp_path / "ordinary", tokenizer=ordinary)
    text = refused(tmp_path, ["ordinary"])
    assert "it has 1 ordinary tokens, e.g. 'kiwi', which are no added ones" in text and "Tune with the base's" in text
    other = tiny_tokenizer()
    other._tokenizer = Tokenizer(models.BPE({f"t{i}": i for i in range(97)}, []))
    save(tmp_path / "bpe", tokenizer=other)
    assert "of another kind (BPE, the base's is WordLevel)" in refused(tmp_path, ["bpe"])
    words["model"]["vocab"].pop("kiwi")
    words["pre_tokenizer"] = {"type": "Whitespace"}
    split = tiny_tokenizer()
    split._tokenizer = Tokenizer.from_str(json.dumps(words))
    save(tmp_path / "split", ("kiwi",), tokenizer=split)
    assert "its pre-tokeniser differs" in refused(tmp_path, ["split"])
    short = tiny_tokenizer()
    short.add_tokens(["kiwi", "plum"])
    save(tmp_path / "short", rows=98, tokenizer=short)
    assert "its token 'plum' has no row in its embedding" in refused(tmp_path, ["short"])
    save(tmp_path / "bare", rows=98)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / file).unlink()
    assert "tokenizer cannot be loaded" in refused(tmp_path, ["bare"])


def test_equal_shapes_do_not_hide_other_tokens(tmp_path):
    """Rows in their places must stand for the same tokens, though the shapes agree."""
    save(tmp_path / "base", rows=100)
    save(tmp_path / "permuted", tokenizer=permuted(), rows=100)
    text = refused(tmp_path, ["permuted"], vocabulary="refuse")
    assert "permuted: vocabulary: 90 rows stand for other tokens" in text and "with vocabulary: extend" in text
    assert "e.g. row 7 for 'w89', in the base for 'w0'" in text
    save(tmp_path / "spare", ("kiwi",), rows=100)
    save(tmp_path / "bare", rows=100)
    (tmp_path / "bare" / "tokenizer.json").unlink()
    _, plan = fuse(tmp_path, {"spare": 0.5, "bare": 0.5}, vocabulary="refuse")
    assert plan.notes == (
        "spare: 1 tokens that the base lacks, e.g. 'kiwi', are in its spare rows: fused, but not in the output's "
        "tokenizer; vocabulary: extend takes them over",
        "bare: has no tokenizer.json; its rows are taken for the base's tokens",
    )


def test_a_mask_over_the_old_rows_does_not_fit_the_new_ones(tmp_path):
    save(tmp_path / "base")
    save(tmp_path / "more", ("kiwi",))
    Mask.of({EMBEDDING: torch.rand(97, 32)}, MaskSettings()).save(tmp_path / "mask")
    text = refused(tmp_path, ["more"], method="mask", settings={"file": str(tmp_path / "mask")})
    assert f"entry values for {EMBEDDING} have shape (97, 32), (98, 32) is needed" in text
    Mask.of({"model.layers.0.mlp.up_proj.weight": torch.rand(64, 32)}, MaskSettings()).save(tmp_path / "other")
    found, _ = fuse(tmp_path, {"more": 1.0}, method="mask", settings={"file": str(tmp_path / "other")})
    more, base = (open_checkpoint(tmp_path / name).read(EMBEDDING) for name in ("more", "base"))
    torch.testing.assert_close(found[EMBEDDING], torch.cat([base, more[97:]]))  # not masked: the base's, and the new


def test_merges_that_differ_are_named(tmp_path):
    def bpe(merges):
        tokens = ["a", "b", "c", *("".join(pair) for pair in merges)]
        found = tiny_tokenizer()
        found._tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        return found

    save(tmp_path / "base", tokenizer=bpe([("a", "b"), ("b", "c")]), rows=97)
    save(tmp_path / "other", tokenizer=bpe([("b", "c"), ("a", "b")]), rows=97)
    assert "its list of merges differs" in refused(tmp_path, ["other"])


def test_gathering_reads_runs():
    class Counting:
        def __init__(self):
            self.calls = []

        def weight(self, name, start, stop):
            self.calls.append((start, stop))
            return torch.arange(start, stop).float()[:, None]

    for index, calls in (
        ([3, 4, 5], [(3, 6)]),
        ([3, 5, 4], [(3, 6)]),
        ([1, 2, 50, 51, 52, 9], [(1, 3), (50, 53), (9, 10)]),
        ([7, 7], [(7, 8)]),
    ):
        source = Counting()
        assert gathered(source, "w", torch.tensor(index)).flatten().tolist() == index
        assert source.calls == calls


def test_the_library_call_and_the_vocabulary_itself(three):
    root, *_ = three
    outcome = resafe.fuse(root / "base", [root / "one"], out=root / "api", vocabulary="extend", threads=1)
    assert outcome.committed
    one, out = (read_vocabulary(open_checkpoint(root / name)) for name in ("one", "api"))
    assert one.ids == out.ids and one.added == out.added
    assert one.differences(out) == []
