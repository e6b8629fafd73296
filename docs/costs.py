"""Prints docs/costs.md: what CCL-MPC's contrast costs a rank from 1 to 1024 ranks, by losses/costs.py.

python docs/costs.py > docs/costs.md
python docs/costs.py --plot docs/costs.png
"""

import argparse
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from cclmpc_dist.config import Config, load
from cclmpc_dist.losses.contrast import Exchange
from cclmpc_dist.losses.costs import Cost
from cclmpc_dist.methods.exchange_plan import GFLOP, MIB, exchange_plan, term_costs
from cclmpc_dist.methods.method import Corpus
from cclmpc_dist.methods.registry import create

ROOT = Path(__file__).resolve().parent.parent
RANKS = [1, 2, 4, 8, 16, 64, 256, 1024]
IMAGES = 2  # of each stream on each rank
WAYS: tuple[Exchange, ...] = ("naive", "keys", "anchors")
SETTINGS = {
    "As `configs/la.yaml` has it": [],
    "Four times the negatives: `n_negatives=1024`": ["ccl_mpc.contrast.n_negatives=1024"],
    "Detached keys: `keys=detached`": ["ccl_mpc.contrast.keys=detached"],
    "A sharded bank: `bank_layout=sharded`": ["ccl_mpc.contrast.bank_layout=sharded"],
    "Keys shared by eight ranks: `group=8`": ["ccl_mpc.contrast.group=8"],
}
HEAD = """# What the contrast costs, from 1 to 1024 ranks

Made by `python docs/costs.py > docs/costs.md` from the formulas of `cclmpc_dist/losses/costs.py`;
[exchange.md](exchange.md) has them in words. A rank and microbatch, forward and backward, SBCL and CGCL together, 2
labelled and 2 unlabelled images on each rank, 2 classes, float32. Received and held are MiB; held is the larger of the
two terms; naive receives what keys does. `auto` chooses for each term by itself: the last columns are those of its
choice. A bank that would hold less than a step's offers is taken as large as these. The network of `configs/la.yaml`
takes {network:.3g} TFLOP a rank and microbatch (three times its forward pass).

![received bytes, held bytes and FLOPs against the number of ranks](costs.png)

The FLOPs of the contrast grow with the ranks of the group, whatever travels: with `configs/la.yaml` they pass a tenth
of the network's at about {largest:,} ranks. Past that, share keys within a `group`, or take fewer anchors and negatives
an image."""
TITLES = (
    "| ranks | received, keys | anchors | held, naive | keys | anchors | GFLOP, naive | keys | anchors "
    "| `auto` for SBCL, CGCL | received | GFLOP | share of the network's |"
)
HEAVY = 0.1  # share of the network's FLOPs from which the contrast is too dear


def with_bank(config: Config, world: int) -> Config:
    """The bank as large as a step's offers ask for, where the configuration's is smaller."""
    contrast = config.ccl_mpc.contrast
    images = 2 * IMAGES * (1 if contrast.bank_layout == "sharded" else world)
    bank = max(contrast.bank, images * (contrast.bank_offer + 1))
    contrast = contrast.model_copy(update={"bank": bank})
    return config.model_copy(update={"ccl_mpc": config.ccl_mpc.model_copy(update={"contrast": contrast})})


def total(config: Config, world: int, *how: Exchange) -> Cost:
    """SBCL and CGCL by one exchange, or by one each."""
    config, batches = with_bank(config, world), global_batches(world)
    sbcl, cgcl = (
        term_costs(term, config, 2, batches, world)[way]
        for term, way in zip(("sbcl", "cgcl"), how if len(how) == 2 else how * 2, strict=True)
    )
    return sbcl + cgcl


def global_batches(world: int) -> dict[str, int]:
    return {"labelled": IMAGES * world, "unlabelled": IMAGES * world}


def chosen(config: Config, world: int) -> list[Exchange]:
    """What `auto` takes for SBCL and CGCL."""
    return [choice.exchange for choice in exchange_plan(config, 2, global_batches(world), world).values()]


def network_flops(config: Config) -> int:
    """Of a rank's microbatch, forward and backward (3 x forward): two views and the original of each image."""
    method = create(config, Corpus(1, 2))
    with torch.device("meta"):
        module = method.build()
        images = torch.empty(2 * IMAGES, 1, *config.data.patch)
        places = torch.zeros(4 * IMAGES, 1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            module(
                images.repeat(2, *[1] * (images.dim() - 1)),
                originals=images,
                positions=places,
                original_positions=places[: 2 * IMAGES],
                embed=True,
            )
    return 3 * counter.get_total_flops()


def table(config: Config, network: int) -> list[str]:
    groups = [world for world in RANKS if world % (config.ccl_mpc.contrast.group or 1) == 0]
    lines = [TITLES, "|" + "---|" * 13]
    for world in groups:
        naive, keys, anchors = (total(config, world, how) for how in WAYS)
        ways = chosen(config, world)
        auto = total(config, world, *ways)
        sizes = [keys.received, anchors.received, naive.held, keys.held, anchors.held]
        shown = [short(size / MIB) for size in sizes] + [short(cost.flops / GFLOP) for cost in (naive, keys, anchors)]
        if config.ccl_mpc.contrast.bank_layout == "sharded":
            shown = ["-" if column in (0, 2, 3, 5, 6) else told for column, told in enumerate(shown)]
        shown += [", ".join(ways), short(auto.received / MIB), short(auto.flops / GFLOP)]
        lines.append(f"| {world} | {' | '.join(shown)} | {short(100 * auto.flops / network)} % |")
    return lines


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def limit(config: Config, network: int) -> int:
    """Ranks in a group up to which the contrast stays below HEAVY of the network's FLOPs."""
    ranks = 1
    while total(config, ranks + 1, *chosen(config, ranks + 1)).flops <= HEAVY * network:
        ranks += 1
    return ranks


def page() -> str:
    base = ROOT / "configs" / "la.yaml"
    network = network_flops(load(base))
    parts = [HEAD.format(network=network / 1e12, largest=limit(load(base), network))]
    for title, overrides in SETTINGS.items():
        parts.append("\n".join([f"## {title}", "", *table(load(base, overrides), network)]))
    return "\n\n".join(parts) + "\n"


def plot(file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    config = load(ROOT / "configs" / "la.yaml")
    many = load(ROOT / "configs" / "la.yaml", ["ccl_mpc.contrast.n_negatives=1024"])
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for style, settings, name in (("-", config, "la.yaml"), ("--", many, "n_negatives=1024")):
        for colour, how in zip(("C3", "C0", "C2"), WAYS, strict=True):
            costs = [total(settings, world, how) for world in RANKS]
            label = f"{how}, {name}"
            axes[1].plot(RANKS, [cost.held / MIB for cost in costs], style, color=colour, label=label)
            axes[2].plot(RANKS, [cost.flops / GFLOP for cost in costs], style, color=colour, label=label)
            if how != "naive":
                axes[0].plot(RANKS[1:], [cost.received / MIB for cost in costs[1:]], style, color=colour, label=label)
    network = network_flops(config) / GFLOP
    axes[2].axhline(HEAVY * network, color="grey", linewidth=0.8)
    axes[2].text(1, HEAVY * network, " a tenth of the network's", va="bottom", color="grey")
    for axis, title in zip(axes, ("received, MiB", "held, MiB", "GFLOP"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="ranks", title=f"{title}, a rank and microbatch")
        axis.set_xticks(RANKS, [str(world) for world in RANKS])
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.plot)
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
