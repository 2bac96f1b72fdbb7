"""Training rows read one at a time into a table of tokens on disk, with the checks that rows in memory get."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from resafe.data.intake import IntakeReport
from resafe.data.intake_sources import stream_training
from resafe.data.items import Example
from resafe.data.mixes import split_by_prompt
from resafe.data.overlap import Overlap, evaluation_prompts, without_overlap
from resafe.errors import InputError
from resafe.training.lengths import fitting
from resafe.training.settings import SftSettings
from resafe.training.sft import encoded_rows
from resafe.training.table import TokenTable, read_table, write_table


def tokens_on_disk(
    names: Sequence[str],
    tokenizer: Any,
    settings: SftSettings,
    out: Path,
    facts: dict[str, Any],
    *,
    system: str | None,
    data_dir: Path | None,
    seed: int,
    hold_out: float,
    max_bad_share: float,
    keep_overlap: bool,
    overlap_hub: bool = False,
) -> TokenTable:
    """The table of what `tune` would train on, in the working directory of the run that writes `out`.

    Of several processes the first one writes it and fills `facts`; the others read it.

    Args:
        names: The sets, see `load_training`.
        tokenizer: With a chat template.
        settings: Where sequences and answers are cut.
        out: The run's result.
        facts: Gets `sources`, `overlap` and `held_out`, as of rows in memory.
        system: System turn of rows without one.
        data_dir: Directory with the files of registered sets.
        seed: Decides which prompts are held out.
        hold_out: Their share.
        max_bad_share: Share of unusable rows of a source above which the run stops.
        keep_overlap: Keep rows that are in an evaluation set.
        overlap_hub: Take evaluation sets that have no file in `data_dir` from the Hub.

    Raises:
        InputError: A source is missing or worse than stated, or every row is in an evaluation set.
    """
    from resafe.training.work import checked_work_directory, processes

    work = checked_work_directory(out)
    state = processes()
    if not state.is_main_process:
        state.wait_for_everyone()
        return read_table(work)
    reports = [IntakeReport(name, keep_places=True) for name in names]
    dropped: dict[str, list[str]] = {}
    held: list[str] = []
    prompts = evaluation_prompts(data_dir, hub=overlap_hub)

    def examples() -> Iterator[Example]:
        for name, report in zip(names, reports, strict=True):
            items = stream_training(name, "examples", data_dir=data_dir, report=report)
            yield from fitting(_only_examples(items), tokenizer, system, settings.max_tokens, report)

    def free() -> Iterator[Example]:
        for example in examples():
            found = without_overlap([example], prompts)
            for where, ids in found.dropped.items():
                dropped.setdefault(where, []).extend(ids)
            yield from [example] if keep_overlap else found.kept

    def trained() -> Iterator[Example]:
        for example in free():
            if hold_out and split_by_prompt([example], test=hold_out, validation=0.0, salt=f"hold-out-{seed}")["test"]:
                held.append(example.id)
            else:
                yield example

    cut = settings.max_tokens, settings.max_answer_tokens, settings.whole_share
    table = write_table(encoded_rows(tokenizer, trained(), system, *cut), work)
    for report in reports:
        report.check(max_bad_share)
    facts["sources"] = [report.to_json() for report in reports]
    facts["overlap"] = {**Overlap[Example]([], dropped, prompts).to_json(), "kept_anyway": keep_overlap}
    if not table.count and dropped and not keep_overlap and not held:
        raise InputError("every row is in an evaluation set", "give other data, or --keep-overlap")
    if hold_out:
        facts["held_out"] = held
    state.wait_for_everyone()
    return table


def _only_examples(items: Iterable[Any]) -> Iterator[Example]:
    return (item for item in items if isinstance(item, Example))
