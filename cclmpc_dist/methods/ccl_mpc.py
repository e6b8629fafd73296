"""CCL-MPC (Du et al., Neurocomputing 621 (2025) 129287): two heterogeneous decoders, certainty-guided consistency and
two contrastive losses. The 3D form is this project's port: no CCL-MPC on 3D data has been published."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from cclmpc_dist.config import Config
from cclmpc_dist.data import draws
from cclmpc_dist.data.views import views
from cclmpc_dist.distributed.exchange import Group, group_rank, group_size, own_group
from cclmpc_dist.losses import certainty, contrast, sampling
from cclmpc_dist.losses.consistency import squared
from cclmpc_dist.losses.memory_bank import MemoryBank, by_class, gather_offers
from cclmpc_dist.losses.segmentation import IGNORE, log_softmax, seg, softmax
from cclmpc_dist.losses.terms import Additive, Part
from cclmpc_dist.methods.exchange_plan import Choice, exchange_plan
from cclmpc_dist.methods.method import Batch, Corpus, Method, Metrics, Phase, Terms
from cclmpc_dist.models.dual_branch import HEAD_STRIDE, DualBranch
from cclmpc_dist.words import counted

LABELLED, UNLABELLED = 0, 1
Pieces = list[list[Tensor]]  # [view][stream]: a slice of a tensor of them all would cost a zero gradient of its size


@dataclass
class Step:
    """What the terms of one microbatch share. Views of an image: index 0 and 1 of the first axis.

    log_c, log_t, log_p: log-probabilities of D_c, D_t and their mean, [view][stream] (b, K, *S); log_t is log_c without
    the Swin decoder. labels: (b_L, *S). pseudo: (b_U, *S), IGNORE where uncertain. labelled: b_L, the first of the B
    images.
    """

    out: dict[str, Tensor]
    log_c: Pieces
    log_t: Pieces
    log_p: Pieces
    labels: Tensor
    pseudo: Tensor | None
    keys: Tensor
    lanes: dict[str, Tensor]
    map_size: list[int]

    @property
    def labelled(self) -> int:
        return self.labels.shape[0]


class CCLMPC(Method):
    phases: ClassVar = [Phase("main", 1.0, {"labelled": 1, "unlabelled": 1})]

    def __init__(self, config: Config, corpus: Corpus) -> None:
        super().__init__(config, corpus)
        self.own = config.ccl_mpc
        self.bank: MemoryBank | None = None
        self.offers: list[tuple[Tensor, Tensor]] = []
        self.group: Group = None
        self.plan: dict[str, Choice] = {}
        self.sharded = self.own.contrast.bank_layout == "sharded"
        self.with_swin = max(self.own.swin_weight, self.own.lambda_con, self.own.lambda_sbcl, self.own.lambda_cgcl) > 0
        self.with_swin |= self.own.predictor == "mean"

    def build(self) -> nn.Module:
        return DualBranch(
            self.config.model,
            self.config.dims,
            self.corpus.channels,
            self.corpus.classes,
            swin=self.with_swin,
            projection=self.own.lambda_sbcl > 0,
            embedding=self.own.lambda_cgcl > 0,
        )

    def enter(self, phase: Phase, total: int, module: nn.Module, batches: dict[str, int]) -> None:
        super().enter(phase, total, module, batches)
        self.first_lane = {"labelled": 0, "unlabelled": batches["labelled"]}
        settings = self.own.contrast
        self.plan = exchange_plan(self.config, self.corpus.classes, batches, group_size())
        if self.plan and self.group is None:  # once, whatever the number of phases
            self.group = own_group(settings.group)
        if self.own.lambda_cgcl > 0 and settings.bank:
            device = next(module.parameters()).device
            self.bank = MemoryBank(self.corpus.classes, settings.bank, self.config.model.embedding, device)

    def weights(self, step: int) -> dict[str, float]:
        """docs/method.md 6. Consistency ramps up over t_ramp T, the contrast starts at t_contrast T."""
        consistency = self.own.lambda_con * certainty.rampup(step / (self.own.t_ramp * self.total))
        contrasting = step >= self.own.t_contrast * self.total
        return {
            "sup": 1.0,
            "hdc": consistency,
            "cp": consistency,
            "av": consistency,
            "sbcl": self.own.lambda_sbcl * contrasting,
            "cgcl": self.own.lambda_cgcl * contrasting,
        }

    def terms(self, model: nn.Module, batch: Batch, step: int) -> tuple[Terms, Metrics]:
        weights = self.weights(step)
        shared = self._forward(model, batch, step, weights)
        terms: Terms = {"sup": self._supervised(shared)}
        metrics: Metrics = {}
        if shared.pseudo is not None:
            metrics["train/certain_fraction"] = _share(shared.pseudo != IGNORE)
            one = shared.log_p[0][UNLABELLED].new_ones(())
            metrics["train/gamma"] = Additive(one * self._gamma(step), one)
        if weights["hdc"] > 0:
            terms |= self._consistency(shared)
        if weights["sbcl"] > 0:
            terms["sbcl"] = self._sbcl(shared)
        if weights["cgcl"] > 0:
            terms["cgcl"] = self._cgcl(shared)
        return terms, metrics

    def _forward(self, model: nn.Module, batch: Batch, step: int, weights: dict[str, float]) -> Step:
        """One pass over the two views of every image that a term of this step needs, and the originals for SBCL."""
        unlabelled = any(weight > 0 for name, weight in weights.items() if name != "sup")
        used = [batch[name] for name in ("labelled", "unlabelled") if unlabelled or name == "labelled"]
        images = torch.cat([part["image"] for part in used])
        keys = torch.cat([part["key"] for part in used])
        seen = torch.cat([views(images, keys, view, self.own.views) for view in (1, 2)])
        asked: dict[str, Any] = {}
        if weights["sbcl"] > 0:
            places = math.prod(_map_size(images))
            settings = self.own.contrast
            asked["positions"] = draws.subset(keys, "sbcl", places, min(settings.n_sbcl, places)).repeat(2, 1)
            asked["originals"] = images
            asked["detach_originals"] = settings.keys == "detached"
            asked["original_positions"] = draws.subset(keys, "negatives", places, min(settings.n_negatives, places))
        out = model(seen, swin=self.with_swin, embed=weights["cgcl"] > 0, **asked)
        sizes = [len(part["image"]) for part in used]
        log_c = _pieces(out["conv"], sizes)
        log_t = _pieces(out["swin"], sizes) if self.with_swin else log_c
        log_p = [
            [certainty.mean_log(*both) for both in zip(c, t, strict=True)] for c, t in zip(log_c, log_t, strict=True)
        ]
        labels = batch["labelled"]["label"]
        pseudo = None
        if unlabelled:
            both = certainty.mean_log(*(view[UNLABELLED].detach() for view in log_p))
            pseudo = certainty.partition(both, self._gamma(step))
        lanes = {name: batch[name]["lane"] for name in ("labelled", "unlabelled") if unlabelled or name == "labelled"}
        return Step(out, log_c, log_t, log_p, labels, pseudo, keys, lanes, _map_size(images))

    def _gamma(self, step: int) -> float:
        """Normalised entropy up to which a pixel is certain."""
        return certainty.gamma(step / self.total, self.own.gamma_start, self.own.gamma_end)

    def _supervised(self, shared: Step) -> list[Part]:
        """docs/method.md 1: mean over the two views, D_c weight 1, D_t weight swin_weight."""
        decoders = [(1.0, shared.log_c), (self.own.swin_weight, shared.log_t)]
        return [
            (0.5 * weight * coefficient, value)
            for weight, log_p in decoders
            if weight > 0
            for view in (0, 1)
            for coefficient, value in seg(log_p[view][LABELLED], shared.labels)
        ]

    def _consistency(self, shared: Step) -> Terms:
        """docs/method.md 2 and 3: l_hdc on both streams, l_cp and l_av on the unlabelled one."""
        assert shared.pseudo is not None
        between: list[Part] = [
            (0.5, squared(log_c.exp(), log_t.exp()))
            for views in zip(shared.log_c, shared.log_t, strict=True)
            for log_c, log_t in zip(*views, strict=True)
        ]
        first, second = (view[UNLABELLED] for view in shared.log_p)
        return {
            "hdc": between,
            "cp": [part for log_p in (first, second) for part in seg(log_p, shared.pseudo)],
            "av": [(1.0, squared(first.exp(), second.exp()))],
        }

    def _classes_on_map(self, shared: Step) -> Tensor:
        """(B, P) labels of the labelled images and certain pseudo-labels of the others, IGNORE elsewhere."""
        assert shared.pseudo is not None
        return certainty.nearest(torch.cat([shared.labels, shared.pseudo]), shared.map_size).flatten(1)

    @record_function("contrast")
    def _sbcl(self, shared: Step) -> list[Part]:
        """docs/method.md 4: views of one stream against the originals of the other. Both directions of a
        stream have equally many anchors, so their mean and the streams' mean is the mean of the four."""
        settings = self.own.contrast
        split = shared.labelled
        z = shared.out["projection"].unflatten(0, (2, -1))  # (2, B, n, F)
        originals = shared.out["original_projection"]
        anchor_class = negative_class = None
        if settings.negatives == "other_class":
            classes = self._classes_on_map(shared)
            places = classes.shape[1]
            at = draws.subset(shared.keys, "sbcl", places, z.shape[2])
            anchor_class = classes.gather(1, at)
            at = draws.subset(shared.keys, "negatives", places, originals.shape[1])
            negative_class = classes.gather(1, at)
        parts: list[Part] = []
        for mine, other in ((slice(0, split), slice(split, None)), (slice(split, None), slice(0, split))):
            value = contrast.sbcl(
                z[:, mine].flatten(0, 2),
                z.flip(0)[:, mine].flatten(0, 2),
                originals[other].flatten(0, 1),
                **self._options("sbcl"),
                anchor_class=None if anchor_class is None else anchor_class[mine].flatten().repeat(2),
                negative_class=None if negative_class is None else negative_class[other].flatten(),
            )
            parts.append((0.5, value))
        return parts

    @record_function("contrast")
    def _cgcl(self, shared: Step) -> list[Part]:
        """docs/method.md 5: sampled positions of both views of all images against all ranks' and the bank's."""
        settings = self.own.contrast
        classes = self._classes_on_map(shared)
        embedding = shared.out["embedding"].unflatten(0, (2, -1)).flatten(3)  # (2, B, F, P)
        features = embedding.permute(1, 0, 3, 2).flatten(1, 2)  # (B, 2P, F): view 1's positions, then view 2's
        small = [certainty.nearest(piece.detach(), shared.map_size) for view in shared.log_p for piece in view]
        guess = certainty.likeliest(torch.cat(small))
        labels = classes.repeat(1, 2)
        hard = guess.unflatten(0, (2, -1)).transpose(0, 1).flatten(1) != labels
        index, valid = sampling.sample_anchors(
            labels, hard, shared.keys, min(settings.n_cgcl, labels.shape[1]), self.corpus.classes, "cgcl"
        )
        lanes = torch.cat([lane + self.first_lane[name] for name, lane in shared.lanes.items()])
        ids = lanes[:, None, None] * labels.shape[1] + index
        if self.bank is not None:
            self._offer(features.detach(), labels, shared)
        value = contrast.cgcl(
            _by_class(_take(features, index)),
            _by_class(valid),
            _by_class(ids),
            bank_keys=None if self.bank is None else self.bank.keys,
            bank_valid=None if self.bank is None else self.bank.valid(),
            sharded=self.sharded and self.bank is not None,
            **self._options("cgcl"),
        )
        return [(1.0, value)]

    def _options(self, term: str) -> dict[str, Any]:
        settings = self.own.contrast
        return {
            "temperature": settings.temperature,
            "exchange": self.plan[term].exchange,
            "tile": settings.tile,
            "detached": settings.keys == "detached",
            "group": self.group,
        }

    def _offer(self, features: Tensor, labels: Tensor, shared: Step) -> None:
        """Put aside this microbatch's keys for the bank: random positions of each class and the class mean."""
        offer = min(self.own.contrast.bank_offer, labels.shape[1])
        index, valid = sampling.sample_offers(labels, shared.keys, offer, self.corpus.classes, "bank")
        means, present = sampling.class_means(features, labels, self.corpus.classes)
        keys = torch.cat([_take(features, index), means[:, :, None]], dim=2)
        valid = torch.cat([valid, present[:, :, None]], dim=2)
        for part in (slice(0, shared.labelled), slice(shared.labelled, None)):
            self.offers.append((keys[part], valid[part]))

    def after_step(self, module: nn.Module) -> None:
        for keys, valid in self.offers:
            assert self.bank is not None
            self.bank.enqueue(*(by_class(keys, valid) if self.sharded else gather_offers(keys, valid)))
        self.offers.clear()

    def discard_step(self) -> None:
        self.offers.clear()

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.sharded else self._bank_state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.bank is not None and not self.sharded:
            self.bank.load_state_dict(_bank_part(state))

    def rank_state_dict(self) -> dict[str, Tensor]:
        return self._bank_state() if self.sharded else {}

    def load_rank_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.bank is not None and self.sharded:
            self.bank.load_state_dict(_bank_part(state))

    def deal(self, states: list[dict[str, Tensor]]) -> str:
        assert self.bank is not None
        dropped = self.bank.deal([_bank_part(state) for state in states], group_rank(), group_size())
        return (f"bank: the keys of {counted(len(states), 'rank')} are dealt out anew to {group_size()}, newest first; "
                f"{dropped} had no room")  # fmt: skip

    def _bank_state(self) -> dict[str, Tensor]:
        return {} if self.bank is None else {f"bank.{name}": value for name, value in self.bank.state_dict().items()}

    def notes(self) -> list[str]:
        places = math.prod(axis // HEAD_STRIDE for axis in self.config.data.patch)
        settings = self.own.contrast
        asked = {"n_sbcl": settings.n_sbcl, "n_negatives": settings.n_negatives} if self.own.lambda_sbcl else {}
        asked |= {"n_cgcl": settings.n_cgcl} if self.own.lambda_cgcl else {}
        short = [f"{name} = {count}: the map has {places} positions, all are taken"
                 for name, count in asked.items() if count > places]  # fmt: skip
        return [choice.note for choice in self.plan.values()] + short

    def predictor(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """D_c's softmax [P], or the mean of both decoders."""
        mean = self.own.predictor == "mean"

        def predict(image: Tensor) -> Tensor:
            out = module(image, swin=mean)
            p_c = softmax(out["conv"])
            return (p_c + softmax(out["swin"])) / 2 if mean else p_c

        return predict


def _bank_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("bank."): value for name, value in state.items()}


def _pieces(logits: Tensor, sizes: list[int]) -> Pieces:
    """Log-probabilities of logits (2 B, K, *S): the streams of view 1, then those of view 2, of the given sizes."""
    found = [log_softmax(part) for part in logits.split(2 * sizes)]
    return [found[: len(sizes)], found[len(sizes) :]]


def _share(mask: Tensor) -> Additive:
    return Additive(mask.sum(), torch.full((), mask.numel(), device=mask.device))


def _map_size(images: Tensor) -> list[int]:
    """S of the map that both heads sit on, from (B, C, *S)."""
    return [axis // HEAD_STRIDE for axis in images.shape[2:]]


def _take(features_BPF: Tensor, index_BKn: Tensor) -> Tensor:
    """(B, K, n, F) features at the positions."""
    flat = index_BKn.flatten(1)[..., None].expand(-1, -1, features_BPF.shape[2])
    return features_BPF.gather(1, flat).unflatten(1, index_BKn.shape[1:])


def _by_class(value_BKn: Tensor) -> Tensor:
    """(B, K, n, ...) -> (K, B*n, ...), image by image."""
    return value_BKn.transpose(0, 1).flatten(1, 2)
