"""The loop: one for every method, launcher and number of processes."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cclmpc_dist.config import Config, check_world
from cclmpc_dist.data import draws
from cclmpc_dist.data.index import Index, select
from cclmpc_dist.data.loader import Stream, loader, to_device
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation.held_out import evaluate_cases
from cclmpc_dist.losses.terms import Additive
from cclmpc_dist.methods.method import Corpus, Phase
from cclmpc_dist.methods.registry import create
from cclmpc_dist.training import preemption, run
from cclmpc_dist.training.checkpoint import Checkpoints
from cclmpc_dist.training.ema import Ema
from cclmpc_dist.training.monitor import Monitor, Window, memory_mib
from cclmpc_dist.training.objective import objective
from cclmpc_dist.training.schedule import rate, total_steps
from cclmpc_dist.training.state import averaged, norm_buffers, restore, save

SKIPS_IN_A_ROW = 50  # non-finite steps after which the run is given up


def train(config: Config) -> bool:
    """Train, or go on where the run folder's newest checkpoint stands. True once the budget is spent, False when
    preempted and saved. Raises InputError for anything a user can mend."""
    accelerator = runtime.start(config.precision)
    try:
        return Trainer(config, accelerator).fit()
    finally:
        runtime.stop()


class Trainer:
    """Holds what a run needs; `fit` is the loop.

    step: optimiser steps done in the phase; done: in all phases; microbatch: of the streams, over all phases.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.rank, self.world = runtime.rank(), runtime.world_size()
        self.index = Index.open(config.data.path)
        self.method = create(config, Corpus(self.index.channels, self.index.classes))
        self.cases = select(self.index, config.data.labelled, config.data.select)
        self.streams = self._streams()
        self.phase, self.step, self.done, self.microbatch, self.skipped, self.in_a_row = 0, 0, 0, 0, 0, 0
        self.totals = self._totals()
        self.checkpoints = Checkpoints(
            run.checkpoints_folder(config.folder), self.rank, self.world, config.checkpoint.keep
        )
        self.best: dict[str, float] = {}
        self.saved, self.saved_at = 0, time.monotonic()
        self.preempted = False
        self.monitor = Monitor(Path(), "", 0, active=False)

    # ---- what is trained on -------------------------------------------------------------------------------------

    def _streams(self) -> dict[str, Stream]:
        config = self.config
        groups = {name: group for phase in self.method.phases for name, group in phase.streams.items()}
        problems = check_world(config, list(groups), self.world)
        if config.dims != self.index.dims:
            problems.append(
                f"data.patch has {config.dims} numbers, {config.data.path} {self.index.dims} axes: one each"
            )
        elif (self.index["shape"][:, 1:] < np.array(config.data.patch)).any(1).all():
            problems.append(
                f"data.patch = {list(config.data.patch)} is larger than every volume of {config.data.path}: "
                "take a smaller one"
            )
        problems += [f"{config.data.path} leaves no case for the {name} stream: change data.labelled or method"
                     for name in groups if not len(self.cases[name])]  # fmt: skip
        if problems:
            raise InputError("\n".join(problems))
        return {
            name: Stream(
                self.index,
                name,
                self.cases[name],
                config.batch(name, self.world),
                config.seed,
                config.data.patch,
                block=config.data.block,
                oversample=config.data.oversample_foreground if name == "labelled" else 0.0,
                rotate=config.data.rotate,
                flip=config.data.flip,
                with_label=name == "labelled",
                on_error=config.data.on_error,
            )
            for name in groups
        }

    def _batches(self) -> dict[str, int]:
        return {name: self.config.batch(name, self.world) for name in self.streams}

    def _totals(self) -> list[int]:
        """Steps of each phase."""
        lengths = {name: stream.order.steps for name, stream in self.streams.items()}
        whole = total_steps(self.config, self._batches(), lengths)
        return [max(1, round(phase.share * whole)) for phase in self.method.phases]

    # ---- what is trained ----------------------------------------------------------------------------------------

    def _build(self) -> None:
        torch.manual_seed(draws.key(self.config.seed, "model"))
        layout = {2: torch.channels_last, 3: torch.channels_last_3d}[self.config.dims]
        self.module = self.method.build().to(self.device)
        if self.config.channels_last:
            self.module.to(memory_format=layout)  # type: ignore[call-overload]
        self.wrapped = runtime.wrap(self.accelerator, self.module)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.buffers = norm_buffers(self.module)
        self.ema = Ema(self.module, self.config.ema) if self.config.ema else None
        torch.manual_seed(draws.key(self.config.seed, "dropout", self.rank))
        self._enter_phase()

    def _enter_phase(self) -> None:
        """A phase begins: its own optimiser and schedule; module, average and stream positions go on."""
        settings = self.config.optim
        options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "foreach": True}
        self.optimizer = self.accelerator.prepare_optimizer(
            torch.optim.SGD(self.parameters, momentum=settings.momentum, **options)
            if settings.name == "sgd"
            else torch.optim.AdamW(self.parameters, **options)
        )
        self.method.enter(self._phase, self.totals[self._at], self.module, self._batches())

    @property
    def _at(self) -> int:
        """The phase's number; a finished run stays in its last."""
        return min(self.phase, len(self.totals) - 1)

    @property
    def _phase(self) -> Phase:
        return self.method.phases[self._at]

    def _start(self) -> None:
        """Build everything, then go on from the newest checkpoint where there is one."""
        folder = self.config.folder
        at = runtime.from_rank_zero(run.newest(folder) if self.rank == 0 else 0, self.device)
        state = run.resumable_state(self.config, at) if at >= 0 else None
        if state is not None:
            self.phase, self.saved = state["phase"], at
        self._build()
        if state is not None:
            restore(self, at, state)
        if self.rank == 0:
            run.prepare(self.config, self.world, max(at, 0))
            preemption.clear(folder)
            self.checkpoints.prepare()
        runtime.barrier()
        self.monitor = Monitor(folder, self.config.name, sum(self.totals), active=self.rank == 0)
        self._introduce(at)

    def _introduce(self, at: int) -> None:
        say = self.monitor.say
        where = f"going on from step {at}" if at >= 0 else "starting at step 0"
        say(
            f"{self.config.folder}: "
            + ("its budget is spent, nothing to do" if self.phase == len(self.totals) else where)
        )
        say(f"{self.config.method}, {sum(self.totals)} steps on {self.world} process(es), {self.device.type}, "
            f"precision {self.config.precision}, {sum(p.numel() for p in self.parameters):,} parameters")  # fmt: skip
        for name, stream in self.streams.items():
            order = stream.order
            say(f"{name}: {len(self.cases[name])} cases, {self._batches()[name]} a microbatch over all ranks, "
                f"{order.steps} microbatches and {order.repeats} repeats an epoch")  # fmt: skip

    # ---- the loop -----------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Train until the budget is spent (True) or preemption was asked for and everything is saved (False)."""
        self._start()
        with self.monitor:
            while self.phase < len(self.totals) and not self.preempted:
                self._fit_phase()
            if self.done > self.saved:
                self._save()
            self.checkpoints.wait()
            runtime.barrier()
        if self.preempted and self.rank == 0:
            preemption.answer(self.config.folder, self.done)
        return not self.preempted

    def _fit_phase(self) -> None:
        batches = self._loader()
        window = Window()
        while self.step < self.totals[self.phase] and not self.preempted:
            values = self._train_step(batches, window)
            self.step, self.done = self.step + 1, self.done + 1
            if self.done % self.config.log_every == 0 or self.step == self.totals[self.phase]:
                self._log(window)
                window = Window()
            if self.config.evaluation.every_steps and self.done % self.config.evaluation.every_steps == 0:
                self._validate()
            self.preempted = values["flag/preempt"] > 0
            every = self.config.checkpoint.every_steps
            if values["flag/save"] > 0 or (every and self.done % every == 0 and self.done < sum(self.totals)):
                self._save()
        if self.step == self.totals[self.phase]:
            self.phase, self.step = self.phase + 1, 0
            if self.phase < len(self.totals):
                self._enter_phase()

    def _loader(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Batches of all the phase's streams from today's position on, on the device."""
        count = (self.totals[self.phase] - self.step) * self.config.accumulate
        workers = self.config.data.workers
        parts = {
            name: loader(self.streams[name], self.microbatch, count, self.rank, self.world, workers, group=group)
            for name, group in self._phase.streams.items()
        }
        for batches in zip(*parts.values(), strict=True):
            yield {name: to_device(batch, self.device) for name, batch in zip(parts, batches, strict=True)}

    def _train_step(self, batches: Iterator[dict[str, dict[str, Tensor]]], window: Window) -> dict[str, float]:
        """One optimiser step, or a step that all ranks skip. Returns its scalars."""
        before = [buffer.clone() for buffer in self.buffers]
        weights = self.method.weights(self.step)
        self.wrapped.train()
        for micro in range(self.config.accumulate):
            batch = window.wait_for(batches)
            last = micro + 1 == self.config.accumulate
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                terms, metrics = self.method.terms(self.wrapped, batch, self.step)
                metrics = metrics | self._flags(batch)
                loss, logged = objective(terms, weights, metrics)
                self.accelerator.backward(loss / self.config.accumulate)
            self.microbatch += 1
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.optim.clip or math.inf)
        read = torch.stack([norm.double(), *logged.values()]).tolist()  # the one host read of the step
        values = dict(zip(["train/gradient_norm", *logged], read, strict=True))
        kept = math.isfinite(values["train/gradient_norm"]) and math.isfinite(values["loss/total"])
        self._update(kept, before)
        window.add(values | {f"weight/{name}": weight for name, weight in weights.items()}, kept)
        return values

    def _update(self, kept: bool, before: list[Tensor]) -> None:
        images = sum(self._batches()[name] for name in self._phase.streams) * self.config.accumulate
        self.lr = rate(self.config.optim, self.step, self.totals[self.phase], images)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if (
            kept or self.accelerator.scaler is not None
        ):  # the scaler itself leaves out an overflow, and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if kept:
            self.method.after_step(self.module)
            if self.ema is not None:
                self.ema.update(self.module, self.done - self.skipped)
            self.in_a_row = 0
            return
        self.method.discard_step()
        torch._foreach_copy_(self.buffers, before) if self.buffers else None
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == SKIPS_IN_A_ROW:
            raise InputError(f"{self.config.folder}: {SKIPS_IN_A_ROW} steps in a row had no finite gradient, up to "
                             f"step {self.done}: lower optim.lr, or set precision to bf16 or fp32")  # fmt: skip

    def _flags(self, batch: dict[str, dict[str, Tensor]]) -> dict[str, Additive]:
        """Rank 0's word on stopping and saving, and samples skipped anywhere, carried by the step's all-reduce."""
        one = float(self.rank == 0)
        minutes = self.config.checkpoint.every_minutes
        due = minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        asked = self.rank == 0 and preemption.asked(self.config.folder)
        skipped = sum(float(part["skipped"]) for part in batch.values())
        flags = {"flag/preempt": (asked * one, one), "flag/save": (due * one, one), "data/skipped": (skipped, one)}
        return {name: Additive(torch.tensor(total), torch.tensor(count)) for name, (total, count) in flags.items()}

    # ---- what is said -------------------------------------------------------------------------------------------

    def _log(self, window: Window) -> None:
        images = sum(self._batches()[name] for name in self._phase.streams) * self.config.accumulate
        values = window.means()
        values |= {"optim/lr": self.lr, "train/skipped_steps": float(self.skipped)}
        values |= window.performance(images) | {"perf/memory_mib": memory_mib(self.device)}
        for name in self._phase.streams:
            values[f"data/{name}_epoch"] = self.microbatch / self.streams[name].order.steps
        self.monitor.scalars(self.done, values)
        self.monitor.progress(self.done, values)

    def _validate(self) -> None:
        """Mean Dice on the cases set aside by data.select; the best checkpoint so far is kept."""
        rows = evaluate_cases(
            self.method.predictor(self.evaluated()), self.index, self.cases["select"], self.config, self.device
        )
        dice = [row["dice"] for row in rows]
        value = sum(dice) / len(dice)
        self.monitor.scalars(self.done, {"val/dice": value})
        self.monitor.say(f"validation at step {self.done}: Dice {value:.4f} over {len(self.cases['select'])} cases")
        if value > self.best.get("dice", -1.0):
            self.best = {"dice": value, "step": self.done}
            self.checkpoints.best = self.done
            self._save()

    def evaluated(self) -> nn.Module:
        """A copy of what evaluation runs: the averaged weights where there are, norm statistics averaged over ranks."""
        return averaged(self.ema.module if self.ema is not None else self.module).eval()

    def _save(self) -> None:
        save(self)
        self.saved, self.saved_at = self.done, time.monotonic()
