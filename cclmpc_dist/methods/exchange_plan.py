"""Which exchange CCL-MPC's contrast takes, from what it would cost (losses/costs.py), and the line that says so."""

import math
from dataclasses import dataclass

from cclmpc_dist.config import Config
from cclmpc_dist.losses import costs
from cclmpc_dist.losses.contrast import Exchange
from cclmpc_dist.losses.costs import Cost
from cclmpc_dist.models.dual_branch import HEAD_STRIDE
from cclmpc_dist.words import counted

MIB, GFLOP = 2**20, 10**9


@dataclass(frozen=True)
class Choice:
    """The exchange of a term, and the line that tells it with what it costs."""

    exchange: Exchange
    note: str


def bank_offers(config: Config, images: int) -> int:
    """Keys a class that a step offers to the bank, of so many images a microbatch over all ranks."""
    return (config.ccl_mpc.contrast.bank_offer + 1) * images * config.accumulate


def exchange_plan(config: Config, classes: int, batches: dict[str, int], world: int) -> dict[str, Choice]:
    """The choice for "sbcl" and "cgcl", those of weight 0 left out. batches: global batch of each stream."""
    own = config.ccl_mpc
    terms = {"sbcl": own.lambda_sbcl, "cgcl": own.lambda_cgcl}
    return {
        term: _choice(term, config, own.contrast.group or world, term_costs(term, config, classes, batches, world))
        for term, weight in terms.items()
        if weight > 0
    }


def term_costs(term: str, config: Config, classes: int, batches: dict[str, int], world: int) -> dict[Exchange, Cost]:
    """Cost of a term for a rank and microbatch under each exchange; CGCL's includes filling the bank."""
    settings = config.ccl_mpc.contrast
    ranks, live, sharded = settings.group or world, settings.keys == "live", settings.bank_layout == "sharded"
    labelled, unlabelled = (batches[stream] // world for stream in ("labelled", "unlabelled"))
    images = labelled + unlabelled
    places = math.prod(size // HEAD_STRIDE for size in config.data.patch)
    found: dict[Exchange, Cost] = {}
    for how in ("naive", "keys", "anchors"):
        if term == "sbcl":
            n, m = 2 * min(settings.n_sbcl, places), min(settings.n_negatives, places)
            known, width = settings.negatives == "other_class", config.model.projection
            sides = [
                costs.sbcl(how, mine * n, other * m, width, ranks, tile=settings.tile, live=live, classes=known)
                for mine, other in ((labelled, unlabelled), (unlabelled, labelled))
            ]
            found[how] = sides[0] + sides[1]
        else:
            n, width = images * min(settings.n_cgcl, 2 * places), config.model.embedding
            offers = min(settings.bank_offer, 2 * places) + 1 if settings.bank else 0
            fill = costs.bank(images, classes, offers, width, world, sharded=sharded)
            found[how] = fill + costs.cgcl(
                how, n, classes, width, ranks, tile=settings.tile, stored=settings.bank, sharded=sharded, live=live
            )
    return found


def _choice(term: str, config: Config, ranks: int, found: dict[Exchange, Cost]) -> Choice:
    settings = config.ccl_mpc.contrast
    if settings.exchange != "auto":
        how, why = settings.exchange, "as set"
    elif term == "cgcl" and settings.bank and settings.bank_layout == "sharded":
        how, why = "anchors", "the bank is sharded"
    elif ranks == 1:
        how, why = "keys", "groups of one: no key travels"
    else:
        how = costs.choose(found["keys"], found["anchors"])
        other: Exchange = "keys" if how == "anchors" else "anchors"
        why = f"auto: {other} would receive {found[other].received / MIB:.3g} MiB"
    cost = found[how]
    offers = ", the bank's offers among them" if term == "cgcl" and settings.bank else ""
    told = f"{cost.received / MIB:.3g} MiB received{offers}, {cost.held / MIB:.3g} MiB held"
    work = f"{cost.flops / GFLOP:.3g} GFLOP a rank and microbatch"
    return Choice(how, f"{term}: exchange {how} ({why}) over {counted(ranks, 'rank')}: {told}, {work}")
