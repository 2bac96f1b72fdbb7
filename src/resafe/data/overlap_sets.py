"""The public evaluation sets whose prompts must not be trained on: where each lies, in a data directory and on the Hub.

Knows nothing of training data, and nothing of lm-eval but its Hub ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from resafe.data.registry import datasets, load_set
from resafe.data.sources import Row, read_file, read_hub
from resafe.errors import InputError


@dataclass(frozen=True)
class PublicPrompts:
    """One evaluation set.

    Attributes:
        name: Its name in reports.
        file: Its file in a data directory; empty if there is none.
        hub: Its Hub id; None if it is not there.
        read: Gives the prompts, from the file in a data directory or, for None, from the Hub. Raises InputError.
    """

    name: str
    file: str
    hub: str | None
    read: Callable[[Path | None], list[str]]

    def not_asked(self, data_dir: Path | None, hub: bool) -> str:
        """Why a set without a file at hand is not looked for; empty if it is looked for on the Hub."""
        where = f"no {self.file} in {data_dir}" if data_dir is not None and self.file else "no file of it was given"
        if self.hub is None:
            return f"{where}, and it is not on the Hub"
        return "" if hub else f"{where}, and the Hub was not asked"


@dataclass(frozen=True)
class _Utility:
    """A task of lm-eval that is no question set of this package: its file, its place on the Hub and its texts."""

    name: str
    file: str
    hub: str
    config: str | None
    split: str
    columns: tuple[str, ...]

    def __call__(self, data_dir: Path | None) -> list[str]:
        if data_dir is None:
            rows: Sequence[Row] = read_hub(self.hub, self.config, self.split)
        else:
            rows = read_file(data_dir / self.file)
        found = [str(row.values[key]) for row in rows for key in self.columns if key in row.values]
        if not found:
            raise InputError(
                f"{self.name}: its rows have no column {' or '.join(self.columns)}", "is it the right file?"
            )
        return found


_UTILITY = (  # ids, configurations and splits as in lm-eval's own definitions; a test compares them
    _Utility("copa", "copa/copa_superglue_val100.jsonl", "aps/super_glue", "copa", "validation", ("premise",)),
    _Utility("xcopa_zh", "xcopa/test.zh.jsonl", "cambridgeltl/xcopa", "zh", "test", ("premise",)),
    _Utility("xnli_hi", "xnli_hi/xnli_dev_hi.jsonl", "facebook/xnli", "hi", "validation", ("premise", "sentence1")),
    _Utility("humaneval", "humaneval/HumanEval.jsonl", "openai/openai_humaneval", None, "test", ("prompt",)),
)


def public_prompts() -> Iterator[PublicPrompts]:
    """The registered question sets, and the utility sets that are not among them."""
    for source in datasets:
        if source.kind == "questions":
            yield PublicPrompts(source.name, source.file, source.hub, _questions(source.name))
    for task in _UTILITY:
        yield PublicPrompts(task.name, task.file, task.hub, task)


def _questions(name: str) -> Callable[[Path | None], list[str]]:
    return lambda data_dir: [item.prompt for item in load_set(name, data_dir=data_dir).items]
