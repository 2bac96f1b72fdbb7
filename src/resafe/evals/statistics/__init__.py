"""Intervals and paired tests for rates measured on the same items.

Knows arrays of per-item scores and nothing of models, files or judges. A rate of one model gets a Wilson score
interval, a difference of two models on the same items a paired score interval, and a ratio of differences (the two
measures of success) a paired bootstrap: one replicate draws the items once and uses them for every model.
"""

from resafe.evals.frontier import frontier, hypervolume
from resafe.evals.statistics.agreement import cohen_kappa, kappa_of_tables, krippendorff_alpha, tables_by_group
from resafe.evals.statistics.bootstrap import Bootstrap, Statistic, paired_bootstrap
from resafe.evals.statistics.comparisons import Comparison, McNemar, compare, holm, mcnemar_exact
from resafe.evals.statistics.correction import JudgeErrors, corrected_rate, rogan_gladen
from resafe.evals.statistics.differences import paired_difference
from resafe.evals.statistics.interval import Array, Interval
from resafe.evals.statistics.measures import over_refusal_added, safety_recovery, utility_retention
from resafe.evals.statistics.nested import nested_bootstrap
from resafe.evals.statistics.power import minimum_detectable_difference
from resafe.evals.statistics.rates import by_topic, mean_interval, wilson, zero_bound

__all__ = [
    "Array",
    "Bootstrap",
    "Comparison",
    "Interval",
    "JudgeErrors",
    "McNemar",
    "Statistic",
    "by_topic",
    "cohen_kappa",
    "compare",
    "corrected_rate",
    "frontier",
    "holm",
    "hypervolume",
    "kappa_of_tables",
    "krippendorff_alpha",
    "mcnemar_exact",
    "mean_interval",
    "minimum_detectable_difference",
    "nested_bootstrap",
    "over_refusal_added",
    "paired_bootstrap",
    "paired_difference",
    "rogan_gladen",
    "safety_recovery",
    "tables_by_group",
    "utility_retention",
    "wilson",
    "zero_bound",
]
