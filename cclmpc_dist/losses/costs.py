"""What a contrast term costs a rank and a step, forward and backward [derived: docs/exchange.md has the formulas].

Received bytes count a ring: all_gather and reduce_scatter of n bytes a rank bring (g - 1) n, all_reduce of n
bytes brings 2 (g - 1) / g n. g ranks in the group, N anchors and M keys a rank, F features, K classes; float32.
"""

from dataclasses import dataclass
from typing import Literal

from cclmpc_dist.config import Contrast
from cclmpc_dist.losses.contrast import Exchange
from cclmpc_dist.losses.streaming import LOGITS, rows_kept

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
    held = _held("sbcl", exchange, anchors, keys, 0, features, ranks, tile, live, 1)
    once = exchange == "naive" or (exchange == "keys" and rows_kept(anchors, ranks * keys) > 0)
    return Cost((ranks - 1) * received, held, _flops(once, features, pairs if live else 0, 0 if live else pairs))


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
    if exchange == "naive" and live:  # autograd takes the gradient of live and bank keys in one product
        flops = _flops(True, features, pairs + banked, 0)
    else:
        flops = _flops(False, features, pairs if live else 0, banked + (0 if live else pairs))
    held = _held("cgcl", exchange, rows, rows, classes * stored, features, ranks, tile, live, classes)
    return Cost((ranks - 1) * received, held, flops)


def bank(images: int, classes: int, offers: int, features: int, world: int, *, sharded: bool = False) -> Cost:
    """Enqueuing a step's `offers` keys (the mean among them) of each of a rank's images and classes."""
    received = 0 if sharded else (world - 1) * images * classes * offers * (features * FLOAT + BOOL)
    return Cost(received, 0, 0)


def choose(keys: Cost, anchors: Cost) -> Literal["keys", "anchors"]:
    """What receives fewer bytes; keys where equal, which needs fewer collectives."""
    return "anchors" if anchors.received < keys.received else "keys"


def _flops(once: bool, features: int, pairs: int, detached: int) -> int:
    """2 F a pair and matrix product: logits, gradients of anchors and keys; logits twice unless visited `once`."""
    live = 3 if once else 4
    return 2 * features * (live * pairs + 2 * detached)


def _held(
    term: str, exchange: Exchange, n: int, m: int, banked: int, f: int, g: int, tile: int, live: bool, classes: int
) -> int:
    """Bytes at the peak beyond inputs and the gradients that are returned; n anchors and m keys a rank, banked keys on
    it.

    Streamed, in numbers: a, those of the anchors that a rank works on (all ranks' for "anchors"); k, those of its live
    keys (all ranks' for "keys"); x, the copy of what was gathered; b, the buffer of logits, as on a CPU.
    """
    if exchange == "naive":
        return FLOAT * ((g > 1) * (1 + live) * g * m * f + NAIVE_COPIES[term] * n * (g * m + banked))
    moved = exchange == "anchors"
    a, k = (g * n * f, m * f) if moved else (n * f, g * m * f)
    x = (g > 1) * (a if moved else k)
    rows, width = (g * n, max(m, banked)) if moved else (n, max(g * m, banked))
    if term == "cgcl":
        b = min(LOGITS, rows // classes * min(tile, width // classes))
        return FLOAT * (max(_cgcl_stages(x, a, k, b, classes, live)) - n * f)
    b = min(LOGITS, rows * min(tile, width))
    once = 0 if moved or not live else rows_kept(rows, width)
    kept = once * (2 * f + width)
    returned = n * f + live * (n * f + m * f)
    return FLOAT * (max(_sbcl_stages(x, a, k, b, kept, n * f, live)) - returned)


def _sbcl_stages(x: int, a: int, k: int, b: int, kept: int, own: int, live: bool) -> list[int]:
    """Numbers alive, the returned gradients' among them, while the negatives are visited, and last in backward.

    Twice: average by forward, gradient, scaled and weighted anchors (4a); without live keys the first two. Once, in
    forward: scaled anchors, their gradient (2a), rows of logits and, twice, of weighted anchors (kept). Last: the own
    anchors' gradients by negatives, by positives and their sum, and the positives'.
    """
    if kept:
        return [x + 2 * a + k + kept, k + 4 * own]
    return [x + 4 * a + k + b, k + 4 * own] if live else [x + 2 * a + b, 3 * own]


def _cgcl_stages(x: int, a: int, k: int, b: int, classes: int, live: bool) -> list[int]:
    """Numbers alive, the returned gradient's among them, in forward, and in backward while the positives' and then
    the other classes' pairs are visited.

    Averages of both kinds of pairs are kept (2a), each freed with its class's backward; a class's own anchors are
    copied scaled, weighted and as gradient (a part of 3a). Each class's gradient is spread over all anchors and added
    to the sum so far (3a at work); the keys' gradients are a sum so far (k) and the other classes' newest.
    """
    part = a // classes
    forward = x + 2 * a + part + 2 * b
    second = x + 5 * a - 2 * part  # the second class's gradient is added while the others' averages are there
    if not live:
        return [forward, second]
    positives = [second + 2 * (k // classes), x + 4 * a + k, x + 2 * a + 4 * part + k + b]
    others = [x + 2 * a + 3 * part + k + (k - k // classes) + b, x + 2 * a + 2 * k]
    return [forward, *positives, *others]
