"""The loop: one for every method, launcher and number of processes."""

import copy
import math
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import record_function

from cclmpc_dist.config import Config
from cclmpc_dist.data import draws
from cclmpc_dist.data.loader import loader, to_device
from cclmpc_dist.data.store import PATIENCE
from cclmpc_dist.distributed import runtime
from cclmpc_dist.distributed.exchange import COLLECTIVE_TIMEOUT
from cclmpc_dist.distributed.watch import Watch
from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation.cases import evaluate_cases
from cclmpc_dist.losses.terms import Additive
from cclmpc_dist.methods.method import Phase
from cclmpc_dist.training import preemption, profiling, run, setup, strategy
from cclmpc_dist.training.checkpoint import Checkpoints
from cclmpc_dist.training.ema import Ema
from cclmpc_dist.training.monitor import Monitor, Window, memory_mib
from cclmpc_dist.training.objective import objective
from cclmpc_dist.training.pace import Pace, slowest
from cclmpc_dist.training.schedule import rate
from cclmpc_dist.training.state import averaged, norm_buffers, random_state, restore, save, set_random_state
from cclmpc_dist.training.throughput import Meter
from cclmpc_dist.words import counted

SKIPS_IN_A_ROW = 50  # non-finite steps after which the run is given up
Batches = dict[str, dict[str, Any]]  # stream -> batch
Listener = Callable[[int, int, dict[str, float]], None]  # steps done, step of the newest save begun, the line's scalars


def train(config: Config, listener: Listener | None = None) -> bool:
    """Train, or go on where the run folder's newest checkpoint stands. True once the budget is spent, False when
    preempted and saved. The listener is called at each log line, on every rank. Raises InputError for anything a user
    can mend."""
    accelerator = strategy.start(config)
    try:
        return Trainer(config, accelerator, listener).fit()
    finally:
        runtime.stop()


class Trainer:
    """Holds what a run needs; `fit` is the loop.

    step: optimiser steps done in the phase; done: in all phases; positions: microbatches taken from each stream.
    """

    def __init__(self, config: Config, accelerator: Accelerator, listener: Listener | None = None) -> None:
        self.listener = listener
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.rank, self.world = runtime.rank(), runtime.world_size()
        self.indexes, self.method, self.cases = setup.corpora(config)
        self.index = self.indexes[0]  # of data.path: validation is on its cases
        self.streams = setup.streams(config, self.indexes, self.method, self.cases, self.world)
        self.batches = {name: stream.batch_size for name, stream in self.streams.items()}
        self.totals = setup.steps_of_phases(config, self.method, self.streams)
        self.total = sum(self.totals)
        self.phase, self.step, self.done, self.skipped, self.in_a_row = 0, 0, 0, 0, 0
        self.positions = dict.fromkeys(self.streams, 0)
        self.checkpoints = Checkpoints(
            run.checkpoints_folder(config.folder), self.rank, self.world, config.checkpoint.keep,
            config.hang_seconds or COLLECTIVE_TIMEOUT.total_seconds(),
        )  # fmt: skip
        seconds = config.hang_seconds
        if config.data.remote and seconds:
            seconds = max(seconds, PATIENCE)  # the reader's own tries come first
        self.watch = Watch(config.folder, seconds)
        self.pace = Pace(self.device)
        self.best: dict[str, float] = {}  # Dice and step of the best validation so far
        self.saved, self.saved_at = 0, time.monotonic()
        self.before: list[Tensor] = []  # norm statistics before the step
        self.preempted, self.grace = False, preemption.grace()
        self.meter = Meter(self.device, config.precision)
        self.monitor = Monitor(config.folder, config.name, self.total, active=self.rank == 0)
        self.profiler = profiling.Profiler(config.profile, config.folder, self.device, self.rank, self.monitor.say)

    # ---- start --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Build everything, then go on from the newest checkpoint where there is one."""
        folder = self.config.folder
        at = runtime.from_rank_zero(run.newest(folder) if self.rank == 0 else 0, self.device)
        state = run.resumable_state(self.config, at) if at >= 0 else None
        if state is not None:
            self.phase, self.saved = state["phase"], at
        self.build()
        told = restore(self, at, state) if state is not None else []
        if self.rank == 0:
            run.prepare(self.config, self.world, self.done)
            preemption.clear(folder)
            self.checkpoints.prepare()
        self.watch.start(self.device)
        runtime.barrier()
        self._introduce(at, told)

    def build(self) -> None:
        """Module, average and strategy, and the phase's beginning."""
        torch.manual_seed(draws.key(self.config.seed, "model"))
        self.module = setup.module(self.config, self.method).to(self.device)
        self.size = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        self.ema = Ema(self.module, self.config.ema) if self.config.ema else None
        self.strategy = strategy.create(self.config, self.accelerator, self.module)  # may replace the buffers
        self.strategy.wrapped.register_forward_hook(lambda *_: self.pace.reached())
        profiling.label(self.strategy.wrapped, "forward")
        self.buffers = norm_buffers(self.module)
        torch.manual_seed(draws.key(self.config.seed, "dropout", self.rank))
        self._enter_phase()

    def _enter_phase(self) -> None:
        """A phase begins: optimiser and schedule start anew; module, average and stream positions go on."""
        self.strategy.optimizer.state.clear()
        self.method.enter(self._phase, self.totals[self._at], self.module, self.batches)

    @property
    def _at(self) -> int:
        """The phase's number; a finished run stays in its last."""
        return min(self.phase, len(self.totals) - 1)

    @property
    def _phase(self) -> Phase:
        return self.method.phases[self._at]

    @property
    def _images(self) -> int:
        """Images of one optimiser step, over all ranks."""
        return sum(self.batches[name] for name in self._phase.streams) * self.config.accumulate

    def _introduce(self, at: int, told: list[str]) -> None:
        if self.done == self.total:
            self.monitor.say(f"{self.config.folder}: its budget is spent, nothing to do")
            return
        where = f"going on from step {at}" if at >= 0 else "starting at step 0"
        for line in [f"{self.config.folder}: {where}", *told]:
            self.monitor.say(line)
        self.describe()
        self._check_grace()

    def describe(self) -> None:
        """Say what is trained on what."""
        say = self.monitor.say
        say(f"{self.config.method}, {counted(self.total, 'step')} on {counted(self.world, 'process')}, "
            f"{self.device.type}, precision {self.config.precision}, {self.size:,} parameters")  # fmt: skip
        for part in [part for stream in self.streams.values() for part in stream.parts]:
            order = part.order
            say(f"{part.name}: {counted(order.n, 'case')}, {order.batch_size} a microbatch over all ranks, "
                f"{counted(order.steps, 'microbatch')} and {counted(order.repeats, 'repeat')} an epoch")  # fmt: skip
        notes = setup.label_notes(self.index, self.cases)
        notes += setup.corpus_notes(self.config, self.streams, self.cases)
        for line in notes + setup.cache_notes(self.config, self.streams) + self.method.notes():
            say(line)

    def _check_grace(self) -> None:
        """Warn, once, of a grace period too short for two saves: one may be under way when the request comes. What a
        save takes is known from the checkpoint that the run goes on from, else from its first."""
        seconds = self.checkpoints.seconds
        if seconds is None or self.grace is None or self.grace >= 2 * seconds:
            return
        self.monitor.say(f"warning: {self.grace:g} s of grace are too few: a save takes {seconds:.1f} s, and one may "
                         f"be under way: give it {math.ceil(2 * seconds)} s and a step's time")  # fmt: skip
        self.grace = None

    def first_step(self) -> Window:
        """Take one step from where the trainer stands, in memory alone. Returns its times."""
        window = Window()
        with window.step():
            self._train_step(self._loader(), window)
        return window

    # ---- the loop -----------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Train until the budget is spent (True) or preemption was asked for and everything is saved (False)."""
        with run.locked(self.config.folder) if self.rank == 0 else nullcontext():
            try:
                return self._fit()
            except torch.OutOfMemoryError as error:
                raise self.profiler.exhausted(error) from error

    def _fit(self) -> bool:
        self._start()
        began = self.done
        try:
            with self.monitor.recording(self.done), self.profiler.watching():
                while self.phase < len(self.totals) and not self.preempted:
                    self._fit_phase()
                self._save()
        except RuntimeError as error:
            told = self.watch.lost(error)
            if told is error:
                raise
            raise told from error
        finally:
            self.checkpoints.wait()
        runtime.barrier()
        finished = self.phase == len(self.totals)
        if self.rank == 0 and finished and self.done > began:
            self.monitor.say(f"{self.config.folder}: trained to step {self.done}: `cclmpc eval` scores it")
        elif self.rank == 0 and not finished:
            preemption.answer(self.config.folder, self.done)
            self.monitor.say(f"{self.config.folder}: saved at step {self.done}: the same command goes on from there")
        return finished

    def _fit_phase(self) -> None:
        batches = self._loader()
        window = Window()
        while self.step < self.totals[self.phase] and not self.preempted:
            with self._whole_or_none(), window.step():
                values = self._train_step(batches, window)
            if self.preempted:
                break
            self.step, self.done = self.step + 1, self.done + 1
            self._profile()
            self.watch.beat(self.done)
            self.watch.arm()
            if self.done % self.config.log_every == 0 or self.step == self.totals[self.phase]:
                with self.watch.resting() if self.meter.due else nullcontext():  # a product may take long on a rank
                    self._log(window)
                window = Window()
            every = self.config.evaluation.every_steps
            better = bool(every) and self.done % every == 0 and self._validate()
            self.preempted = values["flag/preempt"] > 0
            every = self.config.checkpoint.every_steps
            if better or values["flag/save"] > 0 or (every and self.done % every == 0 and self.done < self.total):
                self._save()
        self.watch.disarm()
        if self.step == self.totals[self.phase]:
            self.phase, self.step = self.phase + 1, 0
            if self.phase < len(self.totals):
                self._enter_phase()

    def _loader(self) -> Iterator[Batches]:
        """Batches of all the phase's streams from today's position on, on the device."""
        count = (self.totals[self.phase] - self.step) * self.config.accumulate
        workers = self.config.data.workers
        parts = {
            name: loader(self.streams[name], self.positions[name], count, self.rank, self.world, workers, group=group)
            for name, group in self._phase.streams.items()
        }
        for batches in zip(*parts.values(), strict=True):
            yield {name: to_device(batch, self.device) for name, batch in zip(parts, batches, strict=True)}

    def _train_step(self, batches: Iterator[Batches], window: Window) -> dict[str, float]:
        """One optimiser step, or a step that all ranks skip. Returns its scalars: means over the microbatches."""
        self.before = [buffer.clone() for buffer in self.buffers]
        weights = self.method.weights(self.step)
        active = frozenset(name for name in weights if weights[name] > 0)
        parts = self.config.accumulate
        sums: dict[str, Tensor] = {}
        self.lr = rate(self.config.optim, self.step, self.totals[self.phase], self._images)
        self.strategy.set_rate(self.lr)
        self.strategy.wrapped.train()
        for micro in range(parts):
            self.pace.begin()
            # A signal ends the wait for a store that hangs. One rank of several cannot leave a step alone.
            with record_function("data wait"), preemption.interrupting() if self.world == 1 else nullcontext():
                batch = window.wait_for(batches)
            self.watch.beat(self.done)
            with self.strategy.microbatch(last=micro + 1 == parts):
                with record_function("losses"):
                    forward = partial(self.method.terms, self.strategy.wrapped, batch, self.step)
                    terms, metrics = self.meter.watch(active, forward)
                    loss, logged = objective(terms, weights, metrics | self._flags(batch))
                with record_function("backward"):
                    self.strategy.backward(loss / parts, logged["loss/total"])
            sums = {name: sums[name] + value if sums else value for name, value in logged.items()}
            for name in batch:
                self.positions[name] += 1
            self.watch.beat(self.done)
        with record_function("optimiser"):
            norm = self.strategy.gradient_norm()
            read = torch.stack([norm, *sums.values()]).tolist()  # the one host read of the step
            values = {"train/gradient_norm": read[0]} | {
                name: value / parts for name, value in zip(sums, read[1:], strict=True)
            }
            values["data/skipped"] *= parts
            window.own.append(self.pace.seconds())
            kept = math.isfinite(values["train/gradient_norm"]) and math.isfinite(values["loss/total"])
            self._update(kept)
        shown = {name: value for name, value in values.items() if not name.startswith("flag/")}
        named = {f"weight/{name}": weight for name, weight in weights.items()}
        window.add(shown | named if kept else {"data/skipped": values["data/skipped"]})
        return values

    def _update(self, kept: bool) -> None:
        """Step the optimiser and what follows it; or leave all as it was, norm statistics too."""
        if kept:
            self.strategy.step()
            self.method.after_step(self.module)
            if self.ema is not None:
                self.ema.update(self.module, self.done - self.skipped)
            self.in_a_row = 0
        else:
            self.strategy.discard()
            self.method.discard_step()
            self._put_back_statistics()
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == SKIPS_IN_A_ROW:
            raise InputError(f"{self.config.folder}: {SKIPS_IN_A_ROW} steps in a row had no finite gradient, up to "
                             f"step {self.done}: lower optim.lr, or set precision to bf16 or fp32")  # fmt: skip

    def _put_back_statistics(self) -> None:
        for buffer, old in zip(self.buffers, self.before, strict=True):
            buffer.copy_(old)

    @contextmanager
    def _whole_or_none(self) -> Iterator[None]:
        """Around a step: where a signal ends its wait for data, a checkpoint's content is as before the step, but for
        batch norm's counts of its calls, which nothing reads."""
        positions, random = dict(self.positions), random_state(self.device)
        try:
            yield
        except preemption.Preempted:
            self._put_back_statistics()
            set_random_state(self.device, random)
            self.positions, self.preempted = positions, True

    def _flags(self, batch: Batches) -> dict[str, Additive]:
        """Requests to stop (any rank's) and to save (rank 0's clock), and samples skipped on any rank: they travel in
        the step's all-reduce, so that all ranks act alike."""
        minutes = self.config.checkpoint.every_minutes
        due = self.rank == 0 and minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        asked = preemption.signalled() or (self.rank == 0 and preemption.requested(self.config.folder))
        skipped = sum(part["skipped"] for part in batch.values())
        one = torch.full((), float(self.rank == 0), dtype=torch.float64, device=self.device)
        sums = {"flag/preempt": asked, "flag/save": due, "data/skipped": skipped}
        return {name: Additive(torch.full_like(one, float(value)), one) for name, value in sums.items()}

    # ---- between steps ------------------------------------------------------------------------------------------

    def _log(self, window: Window) -> None:
        values = window.means() | {"data/skipped": window.sums["data/skipped"]}
        if values["data/skipped"]:
            replaced = counted(round(values["data/skipped"]), "unreadable sample")
            self.monitor.say(f"replaced since the last line: {replaced}")
        if skipped := window.steps - window.counts.get("loss/total", 0):
            remedy = "" if self.config.precision == "fp16" else ": look for NaN with `cclmpc verify`, or lower optim.lr"
            self.monitor.say(f"without a finite gradient, and skipped: {counted(skipped, 'step')} of {window.steps} "
                             f"since the last line{remedy}")  # fmt: skip
        values |= {"optim/lr": self.lr, "train/skipped_steps": float(self.skipped)}
        values |= window.performance(self._images, math.prod(self.config.data.patch))
        values |= self.meter.performance(window.seconds) | {"perf/memory_mib": memory_mib(self.device)}
        if self.checkpoints.seconds is not None:
            values["perf/save_seconds"] = self.checkpoints.seconds
            self._check_grace()
        for name in self._phase.streams:
            for part in self.streams[name].parts:
                values[f"data/{part.name}_epoch"] = self.positions[name] / part.order.steps
        late = ""
        if self.world > 1:
            own = runtime.gather_json([statistics.median(window.own), socket.gethostname()], self.device)
            scalars, late = slowest(own, values["perf/step_seconds"])
            values |= scalars
        self.monitor.scalars(self.done, values)
        self.monitor.progress(self.done, values, late)
        if self.listener is not None:
            self.listener(self.done, self.saved, values)

    def _profile(self) -> None:
        """A step was taken. Files are not waited for by the watch: ranks write theirs at different speeds."""
        with self.watch.resting() if self.profiler.ending else nullcontext():
            self.profiler.step(self.done)

    def _validate(self) -> bool:
        """Mean Dice on the cases set aside by data.select; whether it is the best so far. Collective."""
        with self.watch.resting():
            module = copy.deepcopy(self.ema.module) if self.ema else self.strategy.plain()
            predict = self.method.predictor(averaged(module).eval())
            rows = evaluate_cases(predict, self.index, self.cases["select"], self.config, self.device)
        dice = sum(row["dice"] for row in rows) / len(rows)
        self.monitor.scalars(self.done, {"val/dice": dice})
        cases = counted(len(self.cases["select"]), "case")
        self.monitor.say(f"validation at step {self.done}: Dice {dice:.4f} over {cases}")
        better = dice > self.best.get("dice", -1.0)
        if better:
            self.best = {"dice": dice, "step": self.done}
        return better

    def _save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.done > self.saved:
            with self.watch.resting():
                save(self)
                runtime.barrier()  # rank 0 may have waited for the save before
            self.saved, self.saved_at = self.done, time.monotonic()
