"""What `resafe judge calibrate` does: a judge by name over a user's rows and the published sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from resafe.errors import InputError
from resafe.evals.calibration.run import SetCalibration, calibrate, identity
from resafe.evals.calibration.store import Calibration, merged
from resafe.evals.judge import judge_named, make_judge, settings_for
from resafe.evals.labelled import CALIBRATION, SETS, Labelled, load_labelled


def calibrate_named(
    name: str,
    own: Sequence[tuple[str, Sequence[Labelled]]],
    sets: Sequence[str],
    data_dir: Path | None,
    settings: Sequence[str] = (),
    max_cost: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Calibration, list[str]]:
    """Calibrates a judge on all that is given.

    Args:
        name: The judge's name.
        own: Name and labelled rows of a user's files.
        sets: Published sets; none: with a data directory, all whose labels say what the judge measures.
        data_dir: Directory with their files.
        settings: `name=value`, for the judge.
        max_cost: Money that it may spend.
        say: Gets a line before each set, with the estimate of a judge that costs money.

    Returns:
        The calibration, and notes about what was left out.

    Raises:
        InputError: An unknown judge, set or setting, nothing to calibrate on, or nothing left of it.
    """
    method = judge_named(name)
    measure = method.traits["measures"]
    if measure not in ("refusal", "harm"):
        raise InputError(
            f"the judge {name} measures {measure}: no labels are for that", "calibrate a judge of responses"
        )
    given = settings_for([name], settings, max_cost)[name]
    judge = make_judge(name, **given)
    chosen = list(sets)
    if not chosen and data_dir is not None:
        there = [one for one in CALIBRATION if SETS[one].measures == measure]
        chosen = [one for one in there if (data_dir / SETS[one].file).is_file()]
    for one in chosen:
        if one in SETS and not SETS[one].calibrates:
            raise InputError(
                f"{one} is for training only", f"calibrate on {', '.join(CALIBRATION)} or on your own rows"
            )
    material = [*own, *((one, load_labelled(one, data_dir)) for one in chosen)]
    if not material:
        raise InputError("there is nothing to calibrate on", "give --rows FILE, or --data-dir with the published sets")
    estimate = getattr(judge, "estimate", None)
    if estimate is not None:
        say(f"estimate: {estimate([row.judged() for _, rows in material for row in rows])}")
    found: list[SetCalibration] = []
    notes = []
    for one, rows in material:
        say(f"{name}: {one}, {len(rows)} rows")
        try:
            done = calibrate(judge, measure, rows, one)
        except InputError as error:
            if len(material) == 1:
                raise
            notes.append(f"{one} left out: {error.message}")
            continue
        if done.dropped:
            notes.append(f"{one}: {done.dropped} rows dropped, the judge was trained on their prompts")
        found.append(done)
    if not found:
        raise InputError("nothing is left to calibrate on: " + "; ".join(notes), "give other rows")
    return merged(name, identity(name, given, judge)["settings"], measure, found), notes
