"""A training step on a device that only pretends: what it reads back, what it sends there, whether devices mix.

Fake tensors have shapes and devices, and no numbers. What needs a number on the host raises, but for the reads that are
let through and counted, and so does what mixes a tensor of the host into the device's: so it shows without a GPU where
a step would wait for one, or fail on one. The device is torch's "meta", which a CPU build can differentiate on.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from cclmpc_dist.data.loader import loader, to_device
from cclmpc_dist.distributed import runtime
from cclmpc_dist.training.monitor import Window
from cclmpc_dist.training.trainer import Trainer

DEVICE = torch.device("meta")
HOME = str(Path(runtime.__file__).parent.parent)


class Crossings(TorchDispatchMode):
    """Counts what goes between host and device, by the function of cclmpc_dist that does it."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == DEVICE:
            self.read[_function()] += 1
            return 1.0
        out = func(*args, **kwargs or {})
        given = [value for value in args if isinstance(value, Tensor)]
        if isinstance(out, Tensor) and {value.device for value in given} == {torch.device("cpu")} != {out.device}:
            self.sent[_function()] += 1
        return out


def _function() -> str:
    """The innermost function of cclmpc_dist."""
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(HOME):
        frame = frame.f_back
    return frame.f_code.co_qualname.split(".<locals>")[0] if frame is not None else ""


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Autocast knows no such device, and a module of fake tensors cannot be moved: it is made there."""
    monkeypatch.setattr(torch.amp, "autocast", partial(_autocast, torch.amp.autocast))
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.autograd.set_multithreading_enabled(False):
        yield fake


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__clip": 1.0},
        pytest.param(
            {
                "ccl_mpc__contrast": {"negatives": "other_class", "keys": "detached", "bank": 0},
                "model__norm": "instance",
                "optim__name": "adamw",
                "accumulate": 2,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_reads_once_from_the_device_and_sends_its_batch_there(
    changes: dict[str, Any], toy_corpus: Path, tmp_path: Path, alone: None, pretending: FakeTensorMode
) -> None:
    config = toy.config(toy_corpus, tmp_path, data__batch_labelled=2, data__batch_unlabelled=2, **changes)
    accelerator = runtime.start(config.precision)
    accelerator.state.device = DEVICE
    trainer = Trainer(config, accelerator)
    with DEVICE:
        trainer.build()
    trainer.step = trainer.totals[0] - 1  # where every term counts
    with unset_fake_temporarily():
        real = {name: next(loader(stream, 0, 1, workers=0)) for name, stream in trainer.streams.items()}
    host = {name: _fake(batch, pretending) for name, batch in real.items()}
    with Crossings() as found:
        batches = iter(
            [{name: to_device(batch, DEVICE) for name, batch in host.items()} for _ in range(config.accumulate)]
        )
        values = trainer._train_step(batches, Window())
    tensors = sum(isinstance(value, Tensor) for batch in host.values() for value in batch.values())
    assert found.sent == {"to_device": config.accumulate * tensors}
    assert found.read == {"Trainer._train_step": len(values)}, "one list of scalars, once"
    assert {"loss/sbcl", "loss/cgcl", "loss/cp"} <= values.keys()


def _autocast(real: Any, device: str, **options: Any) -> Any:
    return real("cpu", **options)


def _fake(batch: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    return {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x + torch.ones(3), "two (different )?devices"),
        (lambda x: x.gather(0, torch.zeros(3, dtype=torch.int64)), "two (different )?devices"),
    ],
)
def test_a_wait_or_a_mixture_of_devices_is_refused(
    wrong: Callable[[Tensor], Tensor], error: Any, pretending: FakeTensorMode
) -> None:
    expected = {"match": error} if isinstance(error, str) else {}
    with Crossings(), pytest.raises(RuntimeError if expected else error, **expected):
        wrong(torch.ones(3, device=DEVICE))


def test_a_read_and_a_tensor_sent_are_counted(pretending: FakeTensorMode) -> None:
    with Crossings() as found:
        x = torch.ones(3, device=DEVICE)
        assert x.sum().item() == 1.0
        x * torch.tensor([1.0, 2.0, 3.0]).to(DEVICE)
    assert (found.read.total(), found.sent.total()) == (1, 1)
