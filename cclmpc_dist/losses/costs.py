"""What a contrast term costs a rank and a step, forward and backward [derived: docs/exchange.md has the formulas].

Received bytes count a ring: all_gather and reduce_scatter of n bytes a rank bring (g - 1) n, all_reduce of n
bytes brings 2 (g - 1) / g n. g ranks in the group, N anchors and M keys a rank, F features, K classes; float32.
"""

from dataclasses import dataclass
from typing import Literal

from cclmpc_dist.config import Contrast
from cclmpc_dist.losses.contrast import Exchange
from cclmpc_dist.losses.streaming import LOGITS

FLOAT, INT, BOOL = 4, 8, 1  # bytes
TILE: int = Contrast.model_fields["tile"].default
NAIVE_COPIES = {"sbcl": 4, "cgcl": 7}  # N x M float32 tensors alive at the peak (benchmarks/results/contrast.json)


@dataclass(frozen=True)
class Cost:
    """received: bytes from other ranks. held: bytes beyond inputs and their gradients, at the peak. flops: of the
    matrix products."""

    received: int
    held: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        """Of two terms one after the other: the larger peak counts."""
        return Cost(self.received + other.received, max(self.held, other.held), self.flops + other.flops)


def sbcl(
    exchange: Exchange,
    anchors: int,
    keys: int,
    features: int,
    ranks: int,
    *,
    tile: int = TILE,
    live: bool = True,
    classes: bool = False,
) -> Cost:
    """One call of contrast.sbcl with N = anchors and M = keys a rank; `classes` where it is given any."""
    pairs = anchors * ranks * keys
    if exchange == "anchors":
        received = anchors * (2 * features * FLOAT + 6 * FLOAT + classes * INT)
    else:
        received = keys * ((1 + live) * features * FLOAT + classes * INT)
    held = _held("sbcl", exchange, anchors, keys, 0, features, ranks, tile, live)
    return Cost((ranks - 1) * received, held, _flops(exchange, features, pairs if live else 0, 0 if live else pairs))


def cgcl(
    exchange: Exchange,
    anchors: int,
    classes: int,
    features: int,
    ranks: int,
    *,
    tile: int = TILE,
    stored: int = 0,
    sharded: bool = False,
    live: bool = True,
) -> Cost:
    """One call of contrast.cgcl with N = anchors a class and rank, `stored` bank keys a class on each rank."""
    rows = classes * anchors
    if exchange == "anchors":
        received = rows * (2 * features * FLOAT + 10 * FLOAT + INT)
    else:
        received = rows * ((1 + live) * features * FLOAT + BOOL + INT)
    pairs, banked = rows * ranks * rows, rows * classes * stored * (ranks if sharded else 1)
    flops = _flops(exchange, features, pairs if live else 0, banked + (0 if live else pairs))
    held = _held("cgcl", exchange, rows, rows, classes * stored, features, ranks, tile, live)
    return Cost((ranks - 1) * received, held, flops)


def bank(images: int, classes: int, offers: int, features: int, world: int, *, sharded: bool = False) -> Cost:
    """Enqueuing a step's `offers` keys (the mean among them) of each of a rank's images and classes."""
    received = 0 if sharded else (world - 1) * images * classes * offers * (features * FLOAT + BOOL)
    return Cost(received, 0, 0)


def choose(keys: Cost, anchors: Cost) -> Literal["keys", "anchors"]:
    """What receives fewer bytes; keys where equal, which needs fewer collectives."""
    return "anchors" if anchors.received < keys.received else "keys"


def _flops(exchange: Exchange, features: int, pairs: int, detached: int) -> int:
    """2 F a pair and matrix product: logits, gradients of anchors and keys; streaming builds the logits twice."""
    live = 3 if exchange == "naive" else 4
    return 2 * features * (live * pairs + 2 * detached)


def _held(term: str, exchange: Exchange, n: int, m: int, banked: int, f: int, g: int, tile: int, live: bool) -> int:
    """n anchors and m keys a rank, banked keys on it. How often anchors and gathered keys are there at the peak,
    copies, averages and gradients among them, is counted (tests/test_contrast_ranks.py holds it to a quarter)."""
    if exchange == "naive":
        return FLOAT * ((g > 1) * (1 + live) * g * m * f + NAIVE_COPIES[term] * n * (g * m + banked))
    if exchange == "anchors":
        rows, width = g * n, max(m, banked)
        times = 5.5 if live else 4.2 if term == "sbcl" or g == 1 else 5.3
        features = times * rows * f
    else:
        rows, width = n, max(g * m, banked)
        own, gathered = n * f, (g > 1) * g * m * f
        if term == "sbcl":
            features = max(2 * gathered + 2 * own, gathered + 6 * own) if live else gathered + 5 * own
        else:
            features = 3 * g * m * f + 2 * own if live else gathered + 4.5 * own
    buffers = 1 + (term == "cgcl")
    return int(FLOAT * (features + buffers * min(LOGITS, rows * min(tile, width))))
