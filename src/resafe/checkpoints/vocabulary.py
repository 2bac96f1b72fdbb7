"""The tokens of a checkpoint's tokenizer, whether two tokenizers cut text alike, and a tokenizer with more tokens.

Knows tokenizers as files and as transformers loads them; knows no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from resafe.checkpoints.loading import load_tokenizer, quiet
from resafe.checkpoints.reader import Checkpoint
from resafe.errors import InputError, ResafeError


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text as a whole before anything else, with the settings that decide how.

    Attributes:
        content: Its string.
        special: Whether decoding may leave it out.
        normalized: Whether it is looked for in the normalised text.
        single_word: Whether it must stand alone.
        lstrip: Whether it takes the blanks before it.
        rstrip: Whether it takes the blanks after it.
    """

    content: str
    special: bool = False
    normalized: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Attributes:
        ids: Token string → id, added tokens included.
        added: The added tokens, by their strings.
        ordinary: The other tokens, with their scores where the kind of tokenizer has some (0 elsewhere).
        rules: What else decides how text is cut: kind, merges, normaliser, pre-tokeniser, ….
        text: The whole tokenizer as JSON.
    """

    ids: Mapping[str, int]
    added: Mapping[str, AddedToken]
    ordinary: Mapping[str, float]
    rules: Mapping[str, Any]
    text: str = field(repr=False)

    def differences(self, other: Vocabulary) -> list[str]:
        """Why the other tokenizer cuts ordinary text into other tokens; none where only added tokens differ.

        Ids may differ, and a token that is an added one in either may be missing from the other's ordinary ones.
        """
        if self.rules["kind"] != other.rules["kind"]:
            return [f"it is of another kind ({other.rules['kind']}, the base's is {self.rules['kind']})"]
        found, excused = [], set(self.added) | set(other.added)
        for what, mine, theirs in (("more", other, self), ("lacks", self, other)):
            only = [token for token in mine.ordinary if token not in theirs.ordinary and token not in excused]
            if only:
                verb = "has" if what == "more" else "lacks"
                found.append(f"it {verb} {len(only)} ordinary tokens, e.g. {only[0]!r}, which are no added ones")
        both = self.ordinary.keys() & other.ordinary.keys()
        if any(self.ordinary[token] != other.ordinary[token] for token in both):
            found.append("its tokens have other scores")
        found += [f"its {name} differs" for name in sorted(self.rules) if self.rules[name] != other.rules[name]]
        return found

    def ids_with(self, tokens: Sequence[AddedToken]) -> list[int]:
        """The ids that new added tokens get, in their order."""
        import tokenizers

        extended = tokenizers.Tokenizer.from_str(self.text)
        for special, group in groupby(tokens, key=lambda token: token.special):
            add = extended.add_special_tokens if special else extended.add_tokens
            add([_as_stored(token) for token in group])
        found = [extended.token_to_id(token.content) for token in tokens]
        assert all(id_ is not None for id_ in found)  # it was just added
        return [id_ for id_ in found if id_ is not None]


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """The vocabulary of a checkpoint's tokenizer, as transformers loads it.

    Raises:
        InputError: It has no tokenizer, its files are damaged, or one token string stands for two ids.
    """
    tokenizer: Any = load_tokenizer(checkpoint)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{checkpoint.reference}: its tokenizer has no tokenizer.json, so its rules cannot be compared",
            "save it with a current transformers, which converts it",
        )
    text: str = backend.to_str()
    content = json.loads(text)
    model = content["model"]
    entries = model.get("vocab", {})
    if isinstance(entries, list):  # Unigram: pairs of token and score; the place is the id
        ordinary, places = {token: float(score) for token, score in entries}, {t: i for i, (t, _) in enumerate(entries)}
    else:
        ordinary, places = dict.fromkeys(entries, 0.0), dict(entries)
    added = {}
    for entry in content["added_tokens"]:
        token = entry["content"]
        if places.get(token, entry["id"]) != entry["id"]:
            raise InputError(
                f"{checkpoint.reference}: its tokenizer has {token!r} twice, as {places[token]} and {entry['id']}",
                "no row can be matched to it without doubt; mend the tokenizer",
            )
        added[token] = AddedToken(**{name: value for name, value in entry.items() if name != "id"})
    # Merges are pairs in new files and texts with a blank in old ones.
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges", [])
    ]
    rules = {
        "kind": model.get("type"),
        "list of merges": merges,
        "normaliser": content.get("normalizer"),
        "pre-tokeniser": content.get("pre_tokenizer"),
        "model": {name: value for name, value in model.items() if name not in ("type", "vocab", "merges")},
    }
    return Vocabulary(tokenizer.get_vocab(), added, ordinary, rules, text)


def stored_ids(checkpoint: Checkpoint) -> dict[int, str] | None:
    """Id → token string, read from `tokenizer.json` alone; None where there is none, or not one of a known form.

    Much faster than `read_vocabulary`, which lets transformers load the tokenizer: enough to tell whether two
    checkpoints mean the same token by a row.
    """
    path = checkpoint.path / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["model"]["vocab"]
        ids = (
            {number: token for number, (token, _) in enumerate(entries)}
            if isinstance(entries, list)
            else {number: token for token, number in entries.items()}
        )
        return ids | {entry["id"]: entry["content"] for entry in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def extend_tokenizer(directory: Path, tokens: Sequence[AddedToken], ids: Sequence[int]) -> None:
    """Adds tokens to the tokenizer in a directory, in place.

    Args:
        directory: A model directory with tokenizer files.
        tokens: The tokens.
        ids: The ids that they must get.

    Raises:
        ResafeError: The tokenizer gave them others.
    """
    from transformers import AutoTokenizer

    with quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        for special, group in groupby(tokens, key=lambda token: token.special):
            tokenizer.add_tokens([_as_stored(token) for token in group], special_tokens=special)
        tokenizer.save_pretrained(directory)
    found = tokenizer.convert_tokens_to_ids([token.content for token in tokens])
    if list(found) != list(ids):
        raise ResafeError(
            f"{directory}: the tokenizer numbers the new tokens {found[:3]}…, planned was {list(ids)[:3]}…",
            "report this with the tokenizer's files",
        )


def _as_stored(token: AddedToken) -> Any:
    from tokenizers import AddedToken as Stored

    return Stored(
        token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
        normalized=token.normalized, special=token.special,
    )  # fmt: skip
