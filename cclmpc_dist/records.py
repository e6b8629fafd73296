"""What a benchmark's record says of a measurement that was repeated."""

from collections.abc import Sequence
from statistics import median
from typing import Any


def repeated(values: Sequence[float]) -> dict[str, Any]:
    """The record's value, which is the median, and its samples: all of them, in the order in which they were taken."""
    return {"value": median(values), "samples": list(values)}
