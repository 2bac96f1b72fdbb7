"""The fusion engine: plan from headers, validate, execute in units with receipts, verify. Knows nothing of safety."""

from resafe.engine.coefficients import Coefficients
from resafe.engine.plan import Plan, build_plan
from resafe.engine.receipts import Receipt, read_receipts
from resafe.engine.request import Input, Request
from resafe.engine.run import Outcome, execute
from resafe.engine.verify import FileCheck, verify

__all__ = [
    "Coefficients",
    "FileCheck",
    "Input",
    "Outcome",
    "Plan",
    "Receipt",
    "Request",
    "build_plan",
    "execute",
    "read_receipts",
    "verify",
]
