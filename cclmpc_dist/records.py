"""A benchmark's records, and what one says of a measurement that was repeated."""

from collections.abc import Sequence
from statistics import median
from typing import Any

Record = dict[str, Any]


def record(variant: str, metric: str, value: float, unit: str, **place: str) -> Record:
    """place: bench and case, where whoever calls does not add them."""
    return {**place, "variant": variant, "metric": metric, "value": value, "unit": unit}


def repeated(values: Sequence[float]) -> dict[str, Any]:
    """The record's value, which is the median, and its samples: all of them, in the order in which they were taken."""
    return {"value": median(values), "samples": list(values)}
