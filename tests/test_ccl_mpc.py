"""Every term of CCL-MPC on a real batch against formulas written out image by image and position by position."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn

from cclmpc_dist.config import CCLMPC as Own
from cclmpc_dist.data.views import views
from cclmpc_dist.losses import contrast
from cclmpc_dist.losses.segmentation import IGNORE
from cclmpc_dist.methods.ccl_mpc import CCLMPC
from cclmpc_dist.methods.exchange_plan import exchange_plan
from cclmpc_dist.methods.method import Corpus
from cclmpc_dist.training.objective import objective

MAP = 4 * 4 * 4  # positions at stride 8 of a 32-voxel patch
EVERY = {"n_sbcl": MAP, "n_negatives": MAP, "n_cgcl": 2 * MAP, "bank": 64, "bank_offer": 4}  # no position is left out


class Scene:
    """A CCL-MPC with a batch of two labelled and two unlabelled images, half way through its training.

    What a network that has learnt nothing is surest of counts as certain.
    """

    def __init__(self, corpus: Path, **contrast: Any) -> None:
        changes = {"data__patch": [32, 32, 32], "model__norm": "instance", "model__dropout": 0.0}
        own = {"gamma_start": 0.995, "gamma_end": 1.0, "contrast": EVERY | contrast}
        config = toy.config(corpus, Path("runs"), ccl_mpc=own, **changes)
        self.own: Own = config.ccl_mpc
        self.method = CCLMPC(config, Corpus(1, 2))
        torch.manual_seed(3)
        self.module = self.method.build().double()
        self.method.enter(self.method.phases[0], 10, self.module, {"labelled": 2, "unlabelled": 2})
        parts = toy.batches(config, "cpu").items()
        self.batch = {name: part | {"image": part["image"].double()} for name, part in parts}

    def terms(self, step: int = 5) -> dict[str, Tensor]:
        found, metrics = self.method.terms(self.module, self.batch, step)
        return objective(found, self.method.weights(step), metrics)[1]

    def outputs(self) -> list[dict[str, Tensor]]:
        """For each image: its label or None, and what the network says of the views and the original, alone."""
        everything = torch.arange(MAP)[None]
        images = []
        for name in ("labelled", "unlabelled"):
            part = self.batch[name]
            for i in range(2):
                image, key = part["image"][i : i + 1], part["key"][i : i + 1]
                seen = [views(image, key, view, self.own.views) for view in (1, 2)]
                outs = [self.module(view, positions=everything, embed=True) for view in seen]
                original = self.module(image, image, original_positions=everything)["original_projection"][0]
                one = {
                    f"{what}{k}": out[what][0] for k, out in enumerate(outs) for what in ("conv", "swin", "embedding")
                }
                one |= {f"z{k}": out["projection"][0] for k, out in enumerate(outs)} | {"z": original}
                images.append(one | ({"label": part["label"][i]} if name == "labelled" else {}))
        return images


@pytest.fixture
def scene(toy_corpus: Path) -> Scene:
    return Scene(toy_corpus)


def p(logits: Tensor) -> Tensor:
    return logits.softmax(0)


def mean_p(image: dict[str, Tensor], k: int) -> Tensor:
    return (p(image[f"conv{k}"]) + p(image[f"swin{k}"])) / 2


def seg(predictions: list[Tensor], labels: list[Tensor]) -> float:
    """Half cross-entropy, half Dice of the foreground class, over all images' pixels that have a label."""
    entropy = count = intersection = squares = members = 0.0
    for prediction, label in zip(predictions, labels, strict=True):
        known = label != IGNORE
        entropy -= prediction.gather(0, label.clamp(min=0)[None])[0][known].log().sum().item()
        count += known.sum().item()
        foreground, truth = prediction[1][known], (label[known] == 1).double()
        intersection += (foreground * truth).sum().item()
        squares += (foreground**2).sum().item()
        members += truth.sum().item()
    dice = 1 - (2 * intersection + 1e-5) / (squares + members + 1e-5)
    return 0.5 * entropy / max(count, 1) + 0.5 * dice


def certain_labels(scene: Scene, images: list[dict[str, Tensor]], step: int) -> list[Tensor]:
    """The truth, or the likeliest class where the mean prediction's entropy is at most gamma."""
    gamma = 0.995 + 0.005 * math.exp(-5 * (1 - step / 10) ** 2)
    labels = []
    for image in images:
        if "label" in image:
            labels.append(image["label"])
            continue
        mean = (mean_p(image, 0) + mean_p(image, 1)) / 2
        entropy = -(mean * mean.log()).sum(0) / math.log(2)
        labels.append(torch.where(entropy <= gamma, mean.argmax(0), IGNORE))
    return labels


def on_map(volume: Tensor) -> Tensor:
    return volume[..., 4::8, 4::8, 4::8].flatten(-3)


def classes_on_map(scene: Scene, images: list[dict[str, Tensor]], step: int = 5) -> list[Tensor]:
    """Each image's classes at the map's positions: both, and for an unlabelled image none at some."""
    found = [on_map(label) for label in certain_labels(scene, images, step)]
    for image, classes in zip(images, found, strict=True):
        assert set(classes.tolist()) == ({0, 1} if "label" in image else {0, 1, IGNORE})
    return found


def test_dense_terms(scene: Scene) -> None:
    step = 5
    found, images = scene.terms(step), scene.outputs()
    labels = certain_labels(scene, images, step)
    share = sum((label != IGNORE).double().mean().item() for label in labels[2:]) / 2
    assert 0 < share < 1, "the partition must divide the pixels for this test to say anything"
    assert found["train/certain_fraction"].item() == pytest.approx(share)
    sup = sum(
        0.5 * weight * seg([p(image[f"{decoder}{k}"]) for image in images[:2]], labels[:2])
        for decoder, weight in (("conv", 1.0), ("swin", 0.4))
        for k in (0, 1)
    )
    assert found["loss/sup"].item() == pytest.approx(sup, rel=1e-9)
    cp = sum(seg([mean_p(image, k) for image in images[2:]], labels[2:]) for k in (0, 1))
    assert found["loss/cp"].item() == pytest.approx(cp, rel=1e-9)
    differences = [[(p(image[f"conv{k}"]) - p(image[f"swin{k}"])) ** 2 for k in (0, 1)] for image in images]
    hdc = sum(
        torch.stack([torch.stack(pair) for pair in half]).mean().item() for half in (differences[:2], differences[2:])
    )
    assert found["loss/hdc"].item() == pytest.approx(hdc, rel=1e-9)
    av = torch.stack([(mean_p(image, 0) - mean_p(image, 1)) ** 2 for image in images[2:]]).mean().item()
    assert found["loss/av"].item() == pytest.approx(av, rel=1e-9)


@pytest.mark.parametrize("negatives", ["all", "other_class"])
def test_sbcl(negatives: str, toy_corpus: Path) -> None:
    scene = Scene(toy_corpus, negatives=negatives)
    found, images = scene.terms()["loss/sbcl"].item(), scene.outputs()
    classes = classes_on_map(scene, images)
    tau, four = scene.own.contrast.temperature, []
    for mine, other in ((0, 2), (2, 0)):
        for k in (0, 1):
            losses = []
            for i in (mine, mine + 1):
                for at in range(MAP):
                    anchor, positive = images[i][f"z{k}"][at], images[i][f"z{1 - k}"][at]
                    kept = [
                        (anchor @ images[j]["z"][n]).item() / tau
                        for j in (other, other + 1)
                        for n in range(MAP)
                        if negatives == "all" or classes[i][at] == IGNORE or classes[j][n] != classes[i][at]
                    ]
                    away = torch.tensor(kept, dtype=torch.float64).logsumexp(0)
                    losses.append(torch.log1p((away - anchor @ positive / tau).exp()).item())
            four.append(sum(losses) / len(losses))
    assert found == pytest.approx(sum(four) / 4, rel=1e-9)


def test_cgcl(scene: Scene) -> None:
    found, images = scene.terms()["loss/cgcl"].item(), scene.outputs()
    labels = classes_on_map(scene, images)
    keys = torch.cat([image[f"embedding{k}"].flatten(1).T for image in images for k in (0, 1)])
    classes = torch.cat([label for label in labels for _ in (0, 1)])
    assert found == pytest.approx(_cgcl(keys, classes, scene.own.contrast.temperature), rel=1e-9)


def _cgcl(
    keys: Tensor, classes: Tensor, tau: float, bank: Tensor | None = None, bank_classes: Tensor | None = None
) -> float:
    everything = keys if bank is None else torch.cat([keys, bank])
    kinds = classes if bank_classes is None else torch.cat([classes, bank_classes])
    losses = []
    for i in range(len(keys)):
        if classes[i] == IGNORE:
            continue
        logits = everything @ keys[i] / tau
        positive = kinds == classes[i]
        positive[i] = False
        if positive.any():
            away = logits[(kinds != classes[i]) & (kinds != IGNORE)].logsumexp(0)
            losses.append(torch.nn.functional.softplus(away - logits[positive]).mean().item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("n", [7, 80])
def test_half_of_cgcls_positions_are_hard(n: int, toy_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first n // 2 of an image and class, where it has as many; what either kind lacks the other fills up."""
    scene, given, cgcl = Scene(toy_corpus, n_cgcl=n), [], contrast.cgcl
    monkeypatch.setattr(contrast, "cgcl", lambda *args, **options: given.append(args) or cgcl(*args, **options))
    scene.terms()
    ((keys, valid, ids),) = given
    images = scene.outputs()
    for i, (image, label) in enumerate(zip(images, classes_on_map(scene, images), strict=True)):
        hard = torch.cat([on_map(mean_p(image, k)).argmax(0) != label for k in (0, 1)])
        embedding = torch.cat([image[f"embedding{k}"].flatten(1).T for k in (0, 1)])
        for c in (0, 1):
            own = slice(i * n, (i + 1) * n)
            taken = valid[c, own]
            chosen = ids[c, own][taken] - i * 2 * MAP
            members = label.repeat(2) == c
            many, few = int(members.sum()), int((members & hard).sum())
            assert members[chosen].all()
            assert len(set(chosen.tolist())) == len(chosen) == min(n, many)
            assert hard[chosen].sum() == max(min(few, n // 2), len(chosen) - (many - few))
            torch.testing.assert_close(keys[c, own][taken], embedding[chosen], rtol=1e-9, atol=1e-9)


def test_cgcl_with_the_bank_of_the_step_before(scene: Scene) -> None:
    scene.terms(4)
    scene.method.after_step(scene.module)
    bank = scene.method.bank
    assert bank is not None
    assert (bank.count > 0).all()
    found, images = scene.terms()["loss/cgcl"].item(), scene.outputs()
    labels = classes_on_map(scene, images)
    keys = torch.cat([image[f"embedding{k}"].flatten(1).T for image in images for k in (0, 1)])
    stored = torch.cat([bank.keys[c, : bank.count[c]] for c in (0, 1)]).double()
    kinds = torch.repeat_interleave(torch.tensor([0, 1]), bank.count)
    classes = torch.cat([label for label in labels for _ in (0, 1)])
    assert found == pytest.approx(_cgcl(keys, classes, scene.own.contrast.temperature, stored, kinds), rel=1e-9)


def test_bank_takes_only_embeddings_of_the_class(scene: Scene) -> None:
    """Every key is one position's embedding of that class, or an image's mean over them."""
    scene.terms(4)
    scene.method.after_step(scene.module)
    bank, images = scene.method.bank, scene.outputs()
    assert bank is not None
    labels = classes_on_map(scene, images, 4)
    for c in (0, 1):
        allowed = []
        for image, label in zip(images, labels, strict=True):
            members = torch.cat([image[f"embedding{k}"].flatten(1).T[label == c] for k in (0, 1)])
            if len(members):
                allowed += [members, nn.functional.normalize(members.sum(0), dim=0)[None]]
        nearest = torch.cdist(bank.keys[c, : bank.count[c]].double(), torch.cat(allowed)).min(1).values
        assert len(nearest) >= 5
        assert nearest.max() < 1e-5


def test_a_weight_of_zero_costs_nothing(toy_corpus: Path) -> None:
    """No term, no head, no pass over the unlabelled images."""
    off = {"ccl_mpc__lambda_con": 0, "ccl_mpc__lambda_sbcl": 0, "ccl_mpc__lambda_cgcl": 0, "ccl_mpc__swin_weight": 0}
    config = toy.config(toy_corpus, Path("runs"), **off)
    method = CCLMPC(config, Corpus(1, 2))
    module = method.build()
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"encoder", "conv"}
    method.enter(method.phases[0], 10, module, {"labelled": 2, "unlabelled": 2})
    labelled = {"image": torch.randn(2, 1, 32, 16, 16), "label": torch.zeros(2, 32, 16, 16, dtype=torch.int64)}
    shared = {"key": torch.arange(2), "lane": torch.arange(2)}
    unlabelled = {"image": torch.full((2, 1, 32, 16, 16), math.nan)}
    terms, _ = method.terms(module, {"labelled": labelled | shared, "unlabelled": unlabelled | shared}, 5)
    assert set(terms) == {"sup"}
    assert torch.isfinite(terms["sup"][0][1].sum)  # type: ignore[union-attr]


def test_contrast_and_ramp_start_when_they_should(scene: Scene) -> None:
    assert scene.method.weights(0)["cgcl"] == 0
    assert scene.method.weights(1)["cgcl"] == pytest.approx(0.1)
    assert scene.method.weights(0)["cp"] == pytest.approx(0.1 * math.exp(-5))
    assert scene.method.weights(2)["cp"] == pytest.approx(0.1 * math.exp(-5 * 0.25))
    assert scene.method.weights(4)["cp"] == pytest.approx(0.1)


def _encoder_gradient(scene: Scene, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, list(scene.module.encoder.parameters()), allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def test_detached_originals_carry_no_gradient_and_keep_the_value(toy_corpus: Path) -> None:
    live, detached = Scene(toy_corpus), Scene(toy_corpus, keys="detached")
    values = []
    for scene in (live, detached):
        outputs: dict[str, Tensor] = {}
        scene.module.register_forward_hook(lambda *call, kept=outputs: kept.update(call[-1]))
        found, _ = scene.method.terms(scene.module, scene.batch, 5)
        assert outputs["original_projection"].requires_grad == (scene is live)
        parts = [value for _, value in found["sbcl"] + found["cgcl"]]
        values.append(torch.stack([part.sum for part in parts]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
    gradients = [_encoder_gradient(scene, v.sum()) for v, scene in zip(values, (live, detached), strict=True)]
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()
    assert gradients[1].norm() > 0


@pytest.mark.parametrize(
    ("changes", "world", "sbcl", "cgcl"),
    [
        ({}, 1, "keys (groups of one: no key travels)", "keys (groups of one: no key travels)"),
        ({}, 2, "keys (auto: anchors would receive", "keys (auto: anchors would receive"),
        ({"n_negatives": 8, "n_sbcl": 2}, 2, "anchors (auto: keys would receive", "keys (auto"),
        ({"n_negatives": 8, "n_sbcl": 2, "keys": "detached"}, 2, "keys (auto: anchors", "keys (auto"),
        ({"bank_layout": "sharded"}, 2, "keys (auto", "anchors (the bank is sharded)"),
        ({"exchange": "naive"}, 2, "naive (as set)", "naive (as set)"),
        ({"group": 2}, 4, "keys (auto", "over 2 ranks"),
    ],
)
def test_the_exchange_is_chosen_and_told(
    changes: dict[str, Any], world: int, sbcl: str, cgcl: str, tmp_path: Path
) -> None:
    config = toy.config(tmp_path, tmp_path, ccl_mpc__contrast={"bank": 128, "bank_offer": 4} | changes)
    plan = exchange_plan(config, 2, {"labelled": 4, "unlabelled": 4}, world)
    assert sbcl in plan["sbcl"].note
    assert cgcl in plan["cgcl"].note
    assert "MiB received" in plan["sbcl"].note


@pytest.mark.parametrize(("asked", "told"), [(16, False), (17, True)])
def test_more_positions_than_the_map_has_are_told(asked: int, told: bool, tmp_path: Path) -> None:
    """A patch of 32x16x16 has a map of 4x2x2."""
    changes = {f"ccl_mpc__contrast__{name}": 8 for name in ("n_negatives", "n_cgcl")}
    config = toy.config(tmp_path, tmp_path, **changes, ccl_mpc__contrast__n_sbcl=asked)
    method = CCLMPC(config, Corpus(1, 2))
    method.enter(CCLMPC.phases[0], 10, nn.Linear(1, 1), {"labelled": 2, "unlabelled": 2})
    assert ("n_sbcl = 17: the map has 16 positions, all are taken" in method.notes()) == told
