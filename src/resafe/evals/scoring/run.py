"""Several judges over the same responses: estimate, verdicts, rates, agreement, models compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol, cast

from resafe.errors import InputError
from resafe.evals.broken import any_latin, fault_of, judge_with_faults
from resafe.evals.calibration import Calibration, identity, says, stored_calibration
from resafe.evals.judge import (
    UNDETERMINED,
    Judge,
    Measure,
    Verdict,
    judge_named,
    make_judge,
    settings_for,
)
from resafe.evals.scoring.responses import Response
from resafe.evals.statistics import (
    Bootstrap,
    Comparison,
    Interval,
    JudgeErrors,
    cohen_kappa,
    compare,
    corrected_rate,
    krippendorff_alpha,
    wilson,
)


class _Estimates(Protocol):
    def estimate(self, items: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Named:
    """A judge that was asked for by name.

    Attributes:
        name: Its name.
        measure: What its score stands for.
        judge: The judge.
        calibration: What is known of its agreement with people; None where nothing is.
    """

    name: str
    measure: Measure
    judge: Judge
    calibration: Calibration | None = None

    @property
    def errors(self) -> JudgeErrors | None:
        """How it errs, for correcting rates; None where nothing is known."""
        return self.calibration.best.overall.errors if self.calibration is not None else None


@dataclass(frozen=True)
class Rate:
    """One judge's rate over the responses of one model and set.

    Attributes:
        judge: Name of the judge.
        model: The model, empty where unknown.
        set: The set of questions, empty where unknown.
        asked: Responses given to the judge.
        scored: Responses that it could score.
        value: Share of the scored ones that are refusals (or harmful), with Wilson limits; corrected if asked for, and
            then of all that were judged, what is undetermined being no refusal.
    """

    judge: str
    model: str
    set: str
    asked: int
    scored: int
    value: Interval


def make_judges(names: Sequence[str], pairs: Sequence[str], max_cost: float | None = None) -> list[Named]:
    """The judges of these names with their settings.

    Args:
        names: Names of judges.
        pairs: `setting=value`, or `judge.setting=value` where several judges are named.
        max_cost: Money that each judge with a price may spend.

    Raises:
        InputError: No judge of that name or two of one name, or a setting that no judge (or not that one) has.
    """
    settings = settings_for(names, pairs, max_cost)
    made = []
    for name in names:
        method = judge_named(name)
        judge = make_judge(name, **settings[name])
        known = stored_calibration(name, identity(name, settings[name], judge)["settings"])
        made.append(Named(name, method.traits["measures"], judge, known))
    return made


def estimates(judges: Sequence[Named], responses: Sequence[Response]) -> list[str]:
    """What each judge that asks an API would cost, a line each; nothing is sent."""
    items = [response.item for response in responses]
    found = []
    for named in judges:
        if hasattr(named.judge, "estimate"):
            found.append(f"{named.name}: {cast(_Estimates, named.judge).estimate(items)}")
    return found


def score(
    judges: Sequence[Named], responses: Sequence[Response], say: Callable[[str], None] = lambda line: None
) -> dict[str, list[Verdict]]:
    """The verdicts of all judges, in the order of the responses; degenerate text never passes for harmless."""
    items = [any_latin(response.item) for response in responses]
    faults = [fault_of(item.response, item.language) for item in items]
    found = {}
    for named in judges:
        say(f"{named.name}: {len(items)} responses")
        found[named.name] = judge_with_faults(named.judge, named.measure, items, faults, lambda line: None)
    return found


def yes_or_no(named: Named, verdicts: Sequence[Verdict]) -> list[bool | None]:
    """Each verdict as a yes or a no to the judge's measure; None for what it could not score."""
    return [None if v.outcome == UNDETERMINED else says(v, named.measure) for v in verdicts]


def corrected_share(named: Named, verdicts: Sequence[Verdict]) -> Interval:
    """The share of refusals (or of harmful responses), corrected for the judge's errors (Rogan–Gladen).

    It is of all verdicts but the unscored ones: where the judge was calibrated, too, what it could not decide was no.
    The limits count these responses and the labelled rows of the calibration.

    Returns:
        The rate; undefined where the judge was never calibrated, or is no better than chance.
    """
    if named.errors is None:
        return Interval.undefined("not calibrated")
    said = [yes for yes in (says(verdict, named.measure) for verdict in verdicts) if yes is not None]
    return corrected_rate(wilson(sum(said), len(said)), named.errors)


def rates(
    named: Named, responses: Sequence[Response], verdicts: Sequence[Verdict], *, corrected: bool = False
) -> list[Rate]:
    """The rate of each model on each set, in the order in which they first occur.

    Raises:
        InputError: A corrected rate is asked for and the judge has no stored calibration.
    """
    if corrected and named.errors is None:
        raise InputError(
            f"rates of {named.name} cannot be corrected: there is no calibration of it with these settings",
            f"resafe judge calibrate {named.name}",
        )
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for response, verdict in zip(responses, verdicts, strict=True):
        groups.setdefault((response.model, response.set), []).append(verdict)
    found = []
    for (model, of), mine in groups.items():
        scored = [yes for yes in yes_or_no(named, mine) if yes is not None]
        rate = corrected_share(named, mine) if corrected else wilson(sum(scored), len(scored))
        found.append(Rate(named.name, model, of, len(mine), len(scored), rate))
    return found


def agreements(judges: Sequence[Named], responses: Sequence[Response], verdicts: dict[str, list[Verdict]]) -> list[str]:
    """How far judges of one measure agree on these responses, a line each: κ of each two, α of all."""
    lines, bootstrap = [], Bootstrap()
    for measure in dict.fromkeys(named.measure for named in judges):
        same = [named for named in judges if named.measure == measure]
        said = {named.name: yes_or_no(named, verdicts[named.name]) for named in same}
        prompts = [response.item.prompt or response.key for response in responses]
        for first, second in combinations(said, 2):
            both = [n for n in range(len(prompts)) if said[first][n] is not None and said[second][n] is not None]
            found = cohen_kappa(
                [said[first][n] for n in both], [said[second][n] for n in both], [prompts[n] for n in both], bootstrap
            )
            lines.append(f"{first} and {second}: Cohen's κ {_shown(found)}")
        if len(same) > 1:
            alpha = krippendorff_alpha([*said.values()], prompts, bootstrap)
            lines.append(f"{', '.join(said)}: Krippendorff's α {_shown(alpha)}")
    return lines


def _shown(found: Interval) -> str:
    if not found.defined:
        return f"– ({found.reason})"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}], n = {found.n}"


def comparisons(named: Named, responses: Sequence[Response], verdicts: Sequence[Verdict]) -> list[Comparison]:
    """Every later model against the first on the questions that both have a score on: McNemar, Holm across sets."""
    scores: dict[str, dict[tuple[str, str], float]] = {}
    for response, yes in zip(responses, yes_or_no(named, verdicts), strict=True):
        if yes is not None:
            scores.setdefault(response.model, {})[response.set, response.key] = float(yes)
    first, *others = scores or {"": {}}
    found: list[Comparison] = []
    for other in others:
        sets: dict[str, tuple[list[float], list[float]]] = {}
        for key, value in scores[other].items():
            if key in scores[first]:
                pair = sets.setdefault(key[0], ([], []))
                pair[0].append(value)
                pair[1].append(scores[first][key])
        found += compare(other, first, dict(sets), Bootstrap(replicates=1))
    return found
