"""`cclmpc bench all`: one benchmark after the other, each a process of its own, and one report of them all."""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from cclmpc_dist.benching import alone, files, tables
from cclmpc_dist.benching.served import nginx
from cclmpc_dist.config import Config, load
from cclmpc_dist.data import phantom, shards
from cclmpc_dist.data.index import MANIFEST
from cclmpc_dist.errors import InputError
from cclmpc_dist.training.monitor import duration
from cclmpc_dist.training.run import environment

SCRIPTS = Path("benchmarks")  # in a checkout, from its root
LONG = "gpu, gpu_step, evaluate_la, recompute, served, strategies, methods, la_step"
PHANTOMS = 16
STEPS, ROUNDS = 6, 2  # of step and of scale, so that all of it takes minutes


@dataclass(frozen=True)
class Part:
    """A benchmark. name: of its file; command: what comes after Python, without --out; data: what it measures on;
    threads: None leaves them to torch."""

    name: str
    command: list[str]
    data: str
    threads: int | None = None


@dataclass(frozen=True)
class Outcome:
    """seconds: that it took; None for what was left out. told: the data it measured on, or why there is nothing."""

    name: str
    told: str
    seconds: float | None = None
    failed: bool = False


Say = Callable[[str], None]


def bench_all(
    path: Path, overrides: Sequence[str], la: Path | None, list_file: Path | None, folder: Path, say: Say
) -> bool:
    """Measure, write a JSON with table and plot for each benchmark and report.md of them all into `folder`. Whether
    none failed. Raises InputError for a configuration or corpus that cannot be measured.

    path: configuration of step and scale, on its corpus, or on phantoms where that is not there. la, list_file: volumes
    for loader and eval, as those take them.
    """
    began = time.monotonic()
    config = load(path, overrides)
    if config.data.remote:
        raise InputError(f"data.path = {config.data.path}: bench all reads a folder: give it data.path=FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    corpus, data, settings = _corpus(config, folder, say)
    with _store(corpus, data, folder) as part:
        outcomes = [_measured(part, folder, say)]
    for part in _parts(path, config.name, [*overrides, *settings], la, list_file, folder, data):
        outcomes.append(_measured(part, folder, say))
    taken = sum(one.seconds is not None for one in outcomes)
    total = f"{taken} benchmarks in {duration(time.monotonic() - began)}, {len(outcomes) - taken} left out"
    (folder / "report.md").write_text(_report(outcomes, total, folder))
    say(f"{total}: {folder / 'report.md'}")
    return not any(one.failed for one in outcomes)


# ---- what there is to measure --------------------------------------------------------------------------------------


def _corpus(config: Config, folder: Path, say: Say) -> tuple[Path, str, list[str]]:
    """Shards for step, scale and store, in words too, and the settings that lead there."""
    if (Path(config.data.path) / MANIFEST).exists():
        return Path(config.data.path), f"shards of {config.data.path}", []
    if config.dims != 3:
        raise InputError(f"data.path = {config.data.path} holds no shards, and phantoms have three axes: give "
                         "data.path=FOLDER")  # fmt: skip
    size = max(config.data.patch) * 5 // 4
    place = folder / f"phantoms-{size}"
    say(f"{config.data.path} holds no shards: {PHANTOMS} phantoms are taken, {place}")
    shards.write(phantom.cases(PHANTOMS, 0, size), place, source="phantom", labelled=PHANTOMS // 2)
    settings = [f"data.path={place}", "data.labelled=null"]
    return place, f"phantoms of about {size} voxels an axis, as {config.data.path} holds no shards", settings


def _parts(
    path: Path, name: str, overrides: list[str], la: Path | None, list_file: Path | None, folder: Path, data: str
) -> Iterator[Part | Outcome]:
    """All that needs no server, in the order of measurement."""
    volumes = [] if la is None else [f"--la={la}"]
    named = [] if list_file is None else [f"--list={list_file}"]
    cards = torch.cuda.device_count()
    ranks = [str(2**power) for power in range(8) if 2**power <= (cards or 2)]
    yield _loader([*volumes, *named], f"volumes of {la}" if la else "phantoms, without --la")
    yield Part("index_1m", _verb("index", f"--folder={folder}", "--samples=1000000"), "a million samples of no bytes")
    yield Part("eval", _verb("eval", *volumes), f"labels of {la}" if la else "random blobs, without --la", 1)
    yield Part("contrast", _verb("contrast", f"--device={'cuda' if cards else 'cpu'}"), "random features", 1)
    yield Part("checkpoint", _verb("checkpoint", f"--folder={folder}"), "phantoms, files in this folder")
    yield Part(f"step_{name}", _verb("step", str(path), *overrides, f"--steps={STEPS}"), data)
    script = SCRIPTS / "plain_step.py"
    if script.exists():
        yield Part("plain_step", [str(script), str(path), *overrides, "--rounds=1"], data)
    else:
        yield Outcome("plain_step", f"left out: no {script} here, start from the root of the repository")
    yield Outcome(LONG, f"left out: scripts of {SCRIPTS} that take long; their commands stand in its results/README.md")
    if len(ranks) == 1:
        yield Outcome("allreduce", "left out: one GPU has nothing to reduce")
    else:
        yield Part("allreduce", _verb("allreduce", f"--ranks={ranks[-1]}"), "zeros")
    alone = ["data.batch_labelled=1", "data.batch_unlabelled=1"]
    how = [f"--ranks={','.join(ranks)}", f"--steps={STEPS}", f"--rounds={ROUNDS}", "--predict"]
    yield Part(f"scale_{name}", _verb("scale", str(path), *overrides, *alone, *how), f"{data}; 1 + 1 images a rank")


def _loader(arguments: list[str], data: str) -> Part:
    arguments = [*arguments, "--workers=0"]
    if find_spec("blosc2") is None:
        arguments, data = [*arguments, "--rivals=gzip_h5,webdataset"], f"{data}; without blosc2, of the extra bench"
    return Part("loader", _verb("loader", *arguments), data, 1)


@contextmanager
def _store(corpus: Path, data: str, folder: Path) -> Iterator[Part | Outcome]:
    """The store's benchmark, while a server for it runs."""
    absent = [name for name in ("nginx", "curl") if shutil.which(name) is None]
    if absent:
        yield Outcome("store", f"left out: no {' and no '.join(absent)} on the path")
        return
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        try:
            url = stack.enter_context(nginx(corpus, Path(place)))
        except InputError as error:
            yield Outcome("store", str(error), failed=True)
            return
        command = _verb("store", url, f"--cache={folder}", "--repeats=3")
        yield Part("store", command, f"{data}, behind nginx on the loopback")


def _verb(name: str, *arguments: str) -> list[str]:
    return ["-m", "cclmpc_dist", "bench", name, *arguments]


# ---- measuring and telling -----------------------------------------------------------------------------------------


def _measured(part: Part | Outcome, folder: Path, say: Say) -> Outcome:
    """What came of a benchmark, said before and after."""
    if isinstance(part, Part):
        say(f"{part.name}, on {part.data}")
        part = _run(part, folder)
    say(f"{part.name}: " + (part.told if part.seconds is None or part.failed else f"{part.seconds:.0f} s"))
    return part


def _run(part: Part, folder: Path) -> Outcome:
    """Its standard output goes to a log, its errors to ours."""
    out, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    for suffix in (".json", ".md", ".png"):
        out.with_suffix(suffix).unlink(missing_ok=True)
    threads = {} if part.threads is None else {"OMP_NUM_THREADS": str(part.threads)}
    began = time.monotonic()
    with log.open("w") as words:
        command = [sys.executable, *part.command, "--out", str(out)]
        code, _ = alone.run(command, env=os.environ | threads, stdout=words)
    seconds = time.monotonic() - began
    if code or not out.exists():
        return Outcome(part.name, f"failed with exit code {code}", seconds, failed=True)
    if not out.with_suffix(".md").exists():  # of the script
        files.write_pages(files.read(out), out)
    return Outcome(part.name, part.data, seconds)


def _report(outcomes: list[Outcome], total: str, folder: Path) -> str:
    """Markdown: what was measured on what, how long it took, then the page of each."""
    lines = ["# bench all", "", *tables.machine(environment(1)), f"- {total}", "",
             "| benchmark | measured on | seconds | |", "|---|---|---|---|"]  # fmt: skip
    pages = []
    for one in outcomes:
        measured = one.seconds is not None and not one.failed
        where = f"[JSON]({one.name}.json), [printed]({one.name}.log)" if measured else ""
        lines.append(f"| {one.name} | {one.told} | {'' if one.seconds is None else f'{one.seconds:.0f}'} | {where} |")
        if measured:
            page = (folder / f"{one.name}.md").read_text()
            pages += ["", re.sub(r"^#", "##", page, flags=re.MULTILINE).rstrip()]
    return "\n".join([*lines, *pages]) + "\n"
