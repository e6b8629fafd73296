"""From a method's terms to one scalar whose DDP gradient is that of a single process (docs/method.md, across ranks)."""

import torch
from torch import Tensor

from cclmpc_dist.distributed.exchange import all_reduce_sum
from cclmpc_dist.distributed.runtime import world_size
from cclmpc_dist.losses.terms import Additive, Ratio
from cclmpc_dist.methods.method import Metrics, Terms


def objective(terms: Terms, weights: dict[str, float], metrics: Metrics) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to call backward on, and the global value of every term and metric (detached scalars).

    All sums and counts travel in one differentiable all-reduce of float64. An additive term enters as
    W * sum_local / count_world: DDP's average over ranks makes it the global mean. A ratio enters as
    finish(sums_world), without W: every rank holds the same scalar and the all-reduce's backward sums.
    """
    parts = [(name, coefficient, value) for name, term in terms.items() for coefficient, value in term]
    additive = [(name, coefficient, value) for name, coefficient, value in parts if isinstance(value, Additive)]
    ratios = [(name, coefficient, value) for name, coefficient, value in parts if isinstance(value, Ratio)]
    counted = [value for _, _, value in additive] + list(metrics.values())
    device = next(iter(counted)).sum.device if counted else ratios[0][2].sums.device

    def stack(scalars: list[Tensor]) -> Tensor:
        double = [scalar.reshape(1).to(device, torch.float64) for scalar in scalars]
        return torch.cat(double) if double else torch.zeros(0, dtype=torch.float64, device=device)

    local = [
        stack([value.sum.detach() for value in counted]),
        stack([value.count.detach() for value in counted]),
        *[value.sums.to(torch.float64) for _, _, value in ratios],
    ]
    sums, counts, *ratio_sums = all_reduce_sum(torch.cat(local)).split([part.numel() for part in local])
    sums, counts = sums.detach(), counts.detach()
    means = torch.where(counts > 0, sums / counts.clamp(min=1.0), torch.zeros_like(sums))

    loss = torch.zeros((), dtype=torch.float64, device=device)
    values = {name: torch.zeros((), dtype=torch.float64, device=device) for name in terms}
    for place, (name, coefficient, value) in enumerate(additive):
        mine = world_size() * value.sum.to(torch.float64) / counts[place].clamp(min=1.0)
        loss = loss + weights[name] * coefficient * mine
        values[name] = values[name] + coefficient * means[place]
    for (name, coefficient, ratio), reduced in zip(ratios, ratio_sums, strict=True):
        scalar = ratio.finish(reduced)
        loss = loss + weights[name] * coefficient * scalar
        values[name] = values[name] + coefficient * scalar.detach()
    logged = {f"loss/{name}": value for name, value in values.items()}
    total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
    logged["loss/total"] = total
    logged |= {name: means[len(additive) + place] for place, name in enumerate(metrics)}
    return loss, logged
