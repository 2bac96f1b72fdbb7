"""Judges against people: figures with intervals, stored so that reports can say how far a judge is to be trusted."""

from resafe.evals.calibration.metrics import MEASURES, Agreement, agreement
from resafe.evals.calibration.run import SetCalibration, calibrate, compared, identity, says
from resafe.evals.calibration.store import (
    Calibration,
    from_json,
    merged,
    read_calibration,
    remember,
    report_json,
    stored_calibration,
    to_json,
    write_calibration,
)

__all__ = [
    "MEASURES",
    "Agreement",
    "Calibration",
    "SetCalibration",
    "agreement",
    "calibrate",
    "compared",
    "from_json",
    "identity",
    "merged",
    "read_calibration",
    "remember",
    "report_json",
    "says",
    "stored_calibration",
    "to_json",
    "write_calibration",
]
