"""Guard models: classifiers of harmful responses, each with its own prompt format and label map.

`families` holds the formats, `scoring` runs models, `loading` opens them, `judge` is what the registry names.
"""

from __future__ import annotations

from resafe.evals.guards.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
