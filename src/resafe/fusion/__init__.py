"""Ways to combine task vectors into one delta, one file each. Nothing here knows of disks or of safety."""

from resafe.fusion import (
    average,
    breadcrumbs,
    consensus,
    dare,
    dare_ties,
    della,
    emr,
    mask,
    model_stock,
    sce,
    slerp,
    task_arithmetic,
    ties,
    tsv,
)
from resafe.fusion.base import FUSION, Companion, Context, Inputs, fusion_method
from resafe.fusion.run import Fusion

__all__ = [
    "FUSION",
    "Companion",
    "Context",
    "Fusion",
    "Inputs",
    "average",
    "breadcrumbs",
    "consensus",
    "dare",
    "dare_ties",
    "della",
    "emr",
    "fusion_method",
    "mask",
    "model_stock",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
    "tsv",
]
