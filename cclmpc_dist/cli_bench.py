"""`cclmpc bench`: its verbs, each a few lines. A verb imports what it needs when it runs."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cclmpc_dist.errors import InputError

bench = typer.Typer(no_args_is_help=True)


def _place(out: Path | None) -> Path | None:
    from cclmpc_dist.benching import files

    if out is not None:
        files.check_out(out)
    return out


Out = Annotated[
    Path | None,
    typer.Option("--out", callback=_place, help="JSON file to write, with table and plot beside as .md and .png"),
]
Folder = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="on the disk that is measured: files go below it")
]
Setup = Annotated[Path, typer.Argument(help="YAML file of a training run")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings, as in data.batch_labelled=1")]
Steps = Annotated[int, typer.Option(min=2, help="steps that the medians are of, after two of warm-up")]
Predict = Annotated[bool, typer.Option("--predict", help="add the cost model's clusters of up to 1024 GPUs")]
Ranks = Annotated[int | None, typer.Option(min=2, help="start so many ranks here; unset measures the launched ones")]


@bench.callback()
def ended() -> None:
    """Measure this installation; writes JSON records."""
    if "RANK" not in os.environ:  # a launcher ends its ranks itself
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    """Leave as after an error: programs that were started end, temporary files go."""
    _say("cclmpc: bench: ended by SIGTERM")
    sys.exit(128 + number)


@bench.command("loader")
def bench_loader(
    la: Annotated[Path | None, typer.Option(help="folder of <case>/mri_norm2.h5; unset takes phantoms")] = None,
    list_file: Annotated[Path | None, typer.Option("--list", help="file that names the cases")] = None,
    rivals: Annotated[
        str, typer.Option(help="what the loader is measured beside; blosc2 needs the extra `bench`")
    ] = "gzip_h5,webdataset,blosc2",
    workers: Annotated[
        str, typer.Option(help="numbers of workers: processes, and threads of this project's loader")
    ] = "0,1,2",
    cases: Annotated[int, typer.Option(min=1, help="volumes, the first ones")] = 24,
    seconds: Annotated[float, typer.Option(min=0.01, help="least time of a measurement")] = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="rounds that the medians are of")] = 3,
    out: Out = None,
) -> None:
    """Crops a second and CPU second: shards, UA-MT's h5 way, webdataset, blosc2, a bare memcpy; cold and warm.

    Files are written to the folder for temporary files (TMPDIR), which should lie on a disk.
    """
    from cclmpc_dist.benching.loader import bench_loader as measure

    if not all(part.isdecimal() for part in workers.split(",")):
        raise InputError(f"--workers {workers}: write numbers of workers with commas between, as in 0,1,2")
    counts = sorted({int(part) for part in workers.split(",")})
    records = measure(la, list_file, rivals=rivals.split(","), workers=counts, cases=cases, seconds=seconds,
                      repeats=repeats)  # fmt: skip
    _record(records, out)


@bench.command("store")
def bench_store(
    url: Annotated[str, typer.Argument(help="a corpus's http(s) URL, as data.path takes it")],
    cache: Annotated[Path, typer.Option(help="folder on the cache's disk, for files of the measurement alone")],
    repeats: Annotated[int, typer.Option(min=1, help="rounds that the medians are of")] = 5,
    out: Out = None,
) -> None:
    """MB a second of a URL's shards into the cache, and of curl."""
    from cclmpc_dist.benching.store import bench_store as measure

    _record(measure(url, cache, repeats=repeats), out)


@bench.command("index")
def bench_index(
    folder: Folder = Path("."),
    samples: Annotated[int, typer.Option(min=100_000, help="of the corpus; its shards hold nothing")] = 10_000_000,
    shard_samples: Annotated[int, typer.Option(min=1, help="samples a shard")] = 1000,
    trials: Annotated[int, typer.Option(min=2, help="steps whose order is timed")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="starts that the medians are of")] = 3,
    out: Out = None,
) -> None:
    """A corpus of millions of samples: a rank's start, a step's order, and the memory of `cclmpc verify`."""
    from cclmpc_dist.benching.index import bench_index as measure

    _record(measure(folder, samples, shard_samples, trials, repeats), out)


@bench.command("eval")
def bench_eval(
    la: Annotated[Path | None, typer.Option(help="folder of <case>/mri_norm2.h5; unset takes random blobs")] = None,
    volumes: Annotated[int, typer.Option(min=1, help="volumes scored, five predictions each")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="rounds that the medians are of")] = 5,
    out: Out = None,
) -> None:
    """Metrics of whole volumes against medpy: seconds, largest difference."""
    from cclmpc_dist.evaluation.bench import bench_eval as measure

    _record(measure(la, volumes=volumes, repeats=repeats), out)


@bench.command("contrast")
def bench_contrast(
    anchors: Annotated[int, typer.Option(min=1)] = 2048,
    keys: Annotated[int, typer.Option(min=1)] = 65536,
    features: Annotated[int, typer.Option(min=1)] = 256,
    classes: Annotated[int, typer.Option(min=2)] = 2,
    sweep: Annotated[bool, typer.Option("--sweep", help="other sizes too, one changed at a time: ten minutes")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="rounds that the medians are of")] = 3,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where to measure; cpu takes one thread")] = "cpu",
    tf32: Annotated[bool, typer.Option("--tf32", help="matrix products in TF32, on a GPU that has it")] = False,
    out: Out = None,
) -> None:
    """Pixel contrast, all logits at once against streamed: seconds, memory, difference of forward and backward."""
    import torch

    from cclmpc_dist.losses.bench import bench_contrast as measure

    if keys < anchors:
        raise InputError(f"--keys {keys} is less than --anchors {anchors}: the anchors are keys too, give more")
    if anchors < 2 * classes:
        raise InputError(f"--anchors {anchors} is less than two for each of --classes {classes}: give more")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU that torch can use: run `cclmpc doctor`, or take --device cpu")
    _record(measure(anchors, keys, features, classes, sweep, repeats=repeats, device=device, tf32=tf32), out)


@bench.command("checkpoint")
def bench_checkpoint(
    folder: Folder = Path("."),
    repeats: Annotated[int, typer.Option(min=1, help="rounds that the medians are of")] = 7,
    out: Out = None,
) -> None:
    """Seconds that a save holds the loop up, written by the thread against waited for."""
    from cclmpc_dist.training.bench import bench_checkpoint as measure

    _record(measure(folder, repeats=repeats), out)


@bench.command("step")
def bench_step(config: Setup, overrides: Overrides = None, steps: Steps = 10, out: Out = None) -> None:
    """A training step: seconds, images/s, voxels/s, MFU, where each millisecond goes, with and without data loading.

    One process by itself, or one rank of many under torchrun. Nothing is written to the run folder.
    """
    from cclmpc_dist.benching import step
    from cclmpc_dist.config import load

    _report(*step.bench_step(load(config, overrides or []), steps), out)


@bench.command("allreduce")
def bench_allreduce(ranks: Ranks = None, out: Out = None) -> None:
    """All-reduces of 4 KiB to 64 MiB: seconds, and the fit alpha + beta * bytes.

    On the ranks of torchrun, or on --ranks N of this machine.
    """
    from cclmpc_dist.benching import allreduce, launching
    from cclmpc_dist.training.run import command

    if ranks is not None and not launching.in_world():
        launching.check_cards(ranks)
        found = launching.torchrun(ranks, 1, "allreduce")
        _report(found["records"], found["meta"] | {"command": command()}, out)
        return
    _report(*allreduce.bench_allreduce(), out)


@bench.command("scale")
def bench_scale(
    config: Setup,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="numbers of ranks to start here, as in 1,2,4,8")] = "1,2",
    mode: Annotated[
        Literal["weak", "strong", "both"],
        typer.Option(help="weak: the configuration's batches are each rank's; strong: those of all ranks together"),
    ] = "weak",
    steps: Steps = 10,
    rounds: Annotated[int, typer.Option(min=1, help="how often each number of ranks is measured, in turns")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="of a rank; unset: the cores over the most ranks, at least 1")
    ] = None,
    predict: Predict = False,
    out: Out = None,
) -> None:
    """The step on more and more ranks: efficiency, where the milliseconds go, the slowest rank, the prediction.

    By itself it starts the ranks on this machine. Under torchrun it measures the ranks that there are and writes that
    one point (--ranks, --rounds and --predict do not count there); `bench gather` makes one report of several.
    """
    from cclmpc_dist.benching import launching, scale
    from cclmpc_dist.config import load
    from cclmpc_dist.training.run import command

    modes = [one for one in scale.MODES if mode in (one, "both")]
    if launching.in_world():
        if len(modes) > 1:
            raise InputError("bench scale --mode both: the ranks of a launcher measure one point: give weak or strong")
        settings, world = load(config, overrides or []), int(os.environ["WORLD_SIZE"])
        if scale.fits(settings, modes[0], world):
            _point(scale.point(settings, modes[0], steps), out)
        elif os.environ["RANK"] == "0":
            _say(f"strong scaling, {world} ranks: left out, they do not divide the batches")
        return
    numbers = _numbers(ranks)
    if predict:
        scale.check_predictable(modes, numbers)
    parts = scale.launch(config, overrides or [], modes, numbers, steps, rounds, threads, _say)
    report = scale.gathered(parts, predict)
    report["meta"]["command"] = command()
    _show(report, out)


@bench.command("all")
def bench_all(
    config: Setup,
    overrides: Overrides = None,
    la: Annotated[Path | None, typer.Option(help="folder of <case>/mri_norm2.h5, for loader and eval")] = None,
    list_file: Annotated[Path | None, typer.Option("--list", help="file that names its cases")] = None,
    out: Annotated[Path, typer.Option("--out", help="folder for all files; those of before are replaced")] = Path(
        "runs/bench"
    ),
) -> None:
    """All benchmarks in turn, each a process of its own, and one report: eight minutes on two idle cores.

    CONFIG is what step and scale measure, on its shards where they are there. Where LA is not given, or its shards are
    not there, phantoms are measured, and the report says so.
    """
    from cclmpc_dist.benching import everything, launching

    if launching.in_world():
        raise InputError("bench all starts its own ranks: call it by itself, without a launcher")
    if not everything.bench_all(config, overrides or [], la, list_file, out, _say):
        raise typer.Exit(1)


@bench.command("gather")
def bench_gather(
    points: Annotated[list[Path], typer.Argument(help="files that bench scale wrote under torchrun")],
    predict: Predict = False,
    out: Out = None,
) -> None:
    """One scaling report of points measured apart, on several machines as a rule."""
    from cclmpc_dist.benching import files, scale

    _show(scale.gathered([files.read(path) for path in points], predict), out)


@bench.command("report")
def bench_report(report: Annotated[Path, typer.Argument(help="JSON file that bench wrote")]) -> None:
    """Table and plot of a JSON file, as .md and .png beside it."""
    from cclmpc_dist.benching import files

    if report.suffix != ".json":
        raise InputError(f"{report}: give a file that ends in .json: pages get its name with .md and .png")
    print(", ".join(str(path) for path in files.write_pages(files.read(report), report)))


@bench.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="JSON file that bench wrote, or a folder of them")],
    after: Annotated[Path, typer.Argument(help="another one of the same benchmark, or another folder")],
) -> None:
    """What two files both measured, side by side, as Markdown; and what machine, versions and settings differ in.

    Of two folders the files of one name.
    """
    from cclmpc_dist.benching import files

    print(files.compare(before, after))


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise InputError(f"--ranks {text}: write numbers of ranks with commas between, as in 1,2,4")
    return sorted({int(part) for part in text.split(",")})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _report(records: list[dict[str, Any]], meta: dict[str, Any], out: Path | None) -> None:
    """Of every rank: the first one shows it."""
    if _first():
        _show({"meta": meta, "records": records}, out)


def _point(report: dict[str, Any], out: Path | None) -> None:
    from cclmpc_dist.benching import files, tables

    if not _first():
        return
    if out is None:
        print(tables.page(report))
    else:
        files.write(report, out)


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _show(report: dict[str, Any], out: Path | None) -> None:
    from cclmpc_dist.benching import files, tables

    print(tables.page(report))
    if out is not None:
        files.write(report, out)
        files.write_pages(report, out)


def _record(records: list[dict[str, Any]], out: Path | None) -> None:
    from cclmpc_dist.training.run import environment

    _show({"meta": environment(1), "records": records}, out)
