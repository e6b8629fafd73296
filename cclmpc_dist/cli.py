"""`cclmpc`: the verbs, each a few lines. A verb imports what it needs when it runs."""

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from cclmpc_dist import __version__
from cclmpc_dist.cli_bench import bench
from cclmpc_dist.errors import InputError, LostRanks
from cclmpc_dist.words import counted

if TYPE_CHECKING:
    from cclmpc_dist.data.index import Index

app = typer.Typer(
    help="Semi-supervised 3D segmentation with CCL-MPC: a corpus becomes shards, shards train a model, "
    "a run is evaluated and reported.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"cclmpc_dist {__version__}")
        raise typer.Exit


@app.callback()
def _cclmpc(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Options of no verb."""


FAILED, BAD_INPUT, PREEMPTED = 1, 2, 75  # exit codes; 75 asks the launcher to start the run again
UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])  # click's own, or that of typer's copy
Run = Annotated[Path, typer.Argument(help="a run folder, runs/<name>")]


@app.command()
def shard(
    source: Annotated[str, typer.Argument(help="the corpus's folder; for phantom the number of cases")],
    format: Annotated[
        Literal["la-h5", "acdc-h5", "acdc-h5-volumes", "nifti", "nrrd", "dicom", "images", "phantom"],
        typer.Option(help="what the corpus is; docs/formats.md has what each reads and takes"),
    ],
    out: Annotated[Path, typer.Option(help="new folder for the shards and their index, or one begun before")],
    list_file: Annotated[Path | None, typer.Option("--list", help="file that names the cases and their order")] = None,
    labelled: Annotated[int | None, typer.Option(min=1, help="the first N training cases count as labelled")] = None,
    val_last: Annotated[int, typer.Option(min=0, help="the last N cases are for reports only")] = 0,
    classes: Annotated[
        int | None, typer.Option(min=2, help="classes with the background; unset looks at the labels")
    ] = None,
    shard_mib: Annotated[int, typer.Option(min=1, help="largest shard in MiB")] = 64,
    compress: Annotated[Literal["none", "zstd"], typer.Option(help="zstd saves space and costs crop speed")] = "none",
    on_error: Annotated[
        Literal["fail", "skip"], typer.Option(help="a case that cannot be used: stop, or list it in skipped.json")
    ] = "fail",
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes that read and encode; unset: the cores it may use")
    ] = None,
    part: Annotated[
        str, typer.Option(help="i/N: only the i-th run of cases; `cclmpc merge` joins all N", metavar="I/N")
    ] = "1/1",
    labels: Annotated[Path | None, typer.Option(help="folder of labels, named as the images are")] = None,
    label_suffix: Annotated[str, typer.Option(help="what a label's name has after the case's, as in _seg")] = "",
    label_map: Annotated[
        str | None, typer.Option(help="values to classes, as in 0=0,255=1 or 0..127=0,128..255=1", metavar="V=C,...")
    ] = None,
    normalise: Annotated[
        str | None,
        typer.Option(help="none, zscore, percentile:LOW,HIGH or window:LOW,HIGH; unset: zscore, none for h5"),
    ] = None,
    spacing: Annotated[str | None, typer.Option(help="resample to so many mm", metavar="X,Y,Z")] = None,
    orient: Annotated[Literal["RAS", "keep"], typer.Option(help="turn axes to right, front, up, or not")] = "RAS",
    resize: Annotated[str | None, typer.Option(help="resize images to so many pixels", metavar="H,W")] = None,
    channels: Annotated[
        str | None, typer.Option(help="suffixes of a case's files, as in _t1,_t2; or axis; for images grey or rgb")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the phantom")] = 0,
    size: Annotated[int, typer.Option(min=16, help="edge of the phantom's volumes in voxels")] = 64,
) -> None:
    """Write a corpus as WebDataset shards with an index.

    After a stop or a kill the same command goes on; shards that are complete stay. Bytes depend neither on that nor
    on the number of workers.
    """
    from cclmpc_dist.data import phantom, shards, sources
    from cclmpc_dist.data.case import Handle
    from cclmpc_dist.data.formats.options import Options, parse
    from cclmpc_dist.data.merge import merge
    from cclmpc_dist.data.parts import Settings

    number, parts = _part(part)
    options = parse(
        labels=labels, label_suffix=label_suffix, label_map=label_map, classes=classes, normalise=normalise,
        spacing=spacing, orient=orient, resize=resize, channels=channels,
    )  # fmt: skip
    cases: Sequence[Handle]
    if format == "phantom":
        if not source.isdigit() or list_file is not None or options != Options(classes=classes):
            raise InputError(f"{source}: --format phantom takes a number of cases in place of a folder, and no --list "
                             "or other options of files")  # fmt: skip
        cases = phantom.cases(int(source), seed, size)
    else:
        cases = sources.cases(format, source, list_file, options)
    given, shard_bytes = options.given(), shard_mib << 20
    settings = Settings(format, classes, labelled, val_last, shard_bytes, compress, on_error, parts, given)
    record = shards.write_part(cases, out, settings, number, workers or len(os.sched_getaffinity(0)))
    if record is None:
        print(f"{out}: complete already")
    if parts == 1:
        _sharded(out, merge(out))
    elif record is not None:
        print(f"{out}: part {part}: {counted(record['written'], 'case')} in {counted(record['shards'], 'shard')}, "
              f"{record['left_out']} left out")  # fmt: skip


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= parts:
        raise InputError(f"--part {text}: give I/N, I from 1 to N, as in 2/8")
    return number, parts


def _sharded(out: Path, index: "Index") -> None:
    from cclmpc_dist.data.index import VAL

    manifest, held = index.manifest, index["split"] == VAL
    counts, skipped = manifest["counts"], manifest["skipped"]
    listed = f", {skipped} left out ({out / 'skipped.json'} says why)" if skipped else ""
    classes = counted(manifest["classes"], "class") if counts["with_label"] else "no labels"
    print(f"{out}: {counted(counts['samples'], 'case')} in {counted(len(manifest['shards']), 'shard')}, "
          f"{counts['labelled']} labelled, {counts['val']} for reports only, {classes}{listed}")  # fmt: skip
    if counts["with_label"] and held.any() and not index["label_bytes"][held].any():
        print(f"{out}: no case for reports has a label, so that no run can be scored on them: --val-last takes the "
              "list's last cases")  # fmt: skip


@app.command()
def merge(out: Annotated[Path, typer.Argument(help="folder into which every part was written")]) -> None:
    """Make one corpus of the parts that `cclmpc shard --part I/N` wrote; moves and copies no shard."""
    from cclmpc_dist.data import merge as room

    _sharded(out, room.merge(out))


SHARDS = "folder of shards, or its URL: http://, https:// or s3://"
Shards = Annotated[str, typer.Argument(help=SHARDS)]
CacheFolder = Annotated[
    Path | None,
    typer.Option("--cache", help="folder that keeps what a URL gives, as data.cache; unset: a temporary one"),
]
CacheGib = Annotated[float, typer.Option(min=0, help="size of --cache, as data.cache_gib")]


@app.command()
def verify(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help=SHARDS)],
    cache: CacheFolder = None,
    cache_gib: CacheGib = 32,
) -> None:
    """Read every byte of a corpus and compare it with the index.

    Of several, as a run with data.further has them, no patient or image may be in one's validation and another's
    training cases.
    """
    from cclmpc_dist.data import verify as room

    problems = room.verify(*paths, cache=cache, limit=_bytes(cache_gib) if cache else 0)
    if problems:
        raise InputError("\n".join(problems))
    for path in paths:
        print(f"{path}: every shard is as it was written")


@app.command()
def inspect(
    path: Shards,
    cases: Annotated[bool, typer.Option("--cases", help="a line a case, from the index alone, and no summary")] = False,
    sheet: Annotated[Path | None, typer.Option(help="PNG to write: a plane of up to 18 cases with its label")] = None,
    cache: CacheFolder = None,
    cache_gib: CacheGib = 32,
) -> None:
    """Say what a corpus holds, as JSON, an entry a line: counts, sizes, spacing, intensities, classes."""
    from cclmpc_dist.data import verify as room
    from cclmpc_dist.data.remote import visited

    if sheet is not None and (sheet.is_dir() or not os.access(sheet.parent, os.W_OK)):
        raise InputError(f"--sheet {sheet}: cannot be written: name a PNG file in a folder that is there")
    with visited(path, cache, _bytes(cache_gib) if cache else sys.maxsize, check=True) as index:
        if cases:
            for case in room.cases(index):
                print(json.dumps(case))
        else:
            entries = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in room.inspect(index).items()]
            print("{", ",\n".join(entries), "}", sep="\n")
        if sheet is not None:
            from cclmpc_dist.evaluation import pictures

            sheet.write_bytes(pictures.sheet(room.sheet(index)))


def _bytes(gib: float) -> int:
    if not math.isfinite(gib):
        raise InputError(f"--cache-gib {gib}: give a number of GiB")
    return int(gib * (1 << 30))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file; configs/ has examples")],
    overrides: Annotated[list[str] | None, typer.Argument(help="settings, as in data.batch_labelled=4")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="processes the run would have")] = 1,
) -> None:
    """Say what a run would ask of its corpus, as JSON: steps an epoch, bytes a rank, cache, memory of batches.

    From the index alone; `cclmpc train --dry-run` takes a step and tells memory and time.
    """
    from cclmpc_dist.config import load
    from cclmpc_dist.training import plan as room

    print(json.dumps(room.plan(load(config, overrides or []), ranks), indent=1))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; configs/ has examples")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="settings, as in optim.lr=0.01 data.labelled=8; docs/configuration.md has all"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, take one step, tell what the run would cost; no files")
    ] = False,
) -> None:
    """Train, or go on from the newest checkpoint.

    One process by itself, or one rank of many under torchrun or accelerate launch, with the same arguments.
    """
    from cclmpc_dist.config import load

    settings = load(config, overrides or [])
    if dry_run:
        from cclmpc_dist.training.rehearsal import rehearse

        rehearse(settings)
        return
    from cclmpc_dist.training import preemption, trainer

    preemption.listen()
    if not trainer.train(settings) and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise typer.Exit(PREEMPTED)


@app.command(name="eval")
def evaluate(
    run: Run,
    overrides: Annotated[list[str] | None, typer.Argument(help="settings, as in evaluation.stride=[18,18,4]")] = None,
    checkpoint: Annotated[Literal["last", "best"], typer.Option(help="best: on the cases of data.select")] = "last",
    split: Annotated[Literal["val", "select", "unlabelled", "labelled"], typer.Option(help="cases to score")] = "val",
) -> None:
    """Predict and score whole volumes, into RUN/eval/.

    Alone, or sharing the cases over the ranks of torchrun.
    """
    from cclmpc_dist.distributed import runtime
    from cclmpc_dist.evaluation import held_out

    try:
        rows, meta = held_out.evaluate_run(run, checkpoint, split, overrides or [], _say)
        if runtime.rank() == 0:
            _table(rows, meta.unit)
            print(f"per case: {run / 'eval' / 'cases.csv'}")
    finally:
        runtime.stop()


@app.command()
def report(run: Run) -> None:
    """Write RUN/report.html: curves, table, pictures."""
    from cclmpc_dist.evaluation import report as room

    print(f"report and pictures: {room.report(run)}")


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="where runs go, there already or not; nothing is left in it")] = Path(
        "runs"
    ),
) -> None:
    """Look at what training here depends on: one line a check, OK, warning or failed, with what to do.

    Versions, GPUs, shared memory, cores, bf16 convolutions, the run folder's file system, and whether the ranks meet
    and how fast they reduce. Alone, or on every rank of torchrun (srun torchrun too) or accelerate launch; under Ray
    launch/ray_train.py --doctor. Rank 0 prints, and names the ranks out of line. Exit code 1 where a check failed.
    """
    from cclmpc_dist.distributed import doctor as room

    if not room.examine(folder):
        raise typer.Exit(FAILED)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(rows: list[dict[str, Any]], unit: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from cclmpc_dist.evaluation.metrics import metrics_in, summary

    metrics = metrics_in(unit)
    table = Table("class", "metric", "unit", "mean", "SD", "95 % interval", "cases", "undefined")
    for entry in summary(rows):
        mean, sd, low, high = (f"{entry[name]:.4f}" for name in ("mean", "sd", "low", "high"))
        interval = f"{low} - {high}" if math.isfinite(entry["low"]) else "-"
        numbers = mean, sd, interval, str(entry["n"]), str(entry["n_excluded"])
        metric = metrics[entry["metric"]]
        table.add_row(str(entry["class"]), metric.title, metric.unit, *numbers)
    Console(width=110).print(table)


def _unsaid(text: str) -> bool:
    """Whether no rank of this torchrun agent has said the same: a node says a message once, and what only one rank sees
    is never lost. True without an agent, which takes the note of it away with its temporary folder."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        return True
    attempt = Path(error_file).parent.parent  # of the agent; each rank has a folder in it
    try:
        (attempt / f"said-{sha256(text.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _run() -> int:
    """The exit code. Raises InputError for words of the command line that it does not take."""
    try:
        return app(prog_name="cclmpc", standalone_mode=False) or 0
    except UsageError as error:
        if type(error).show is not UsageError.show:  # type: ignore[attr-defined]
            error.show()  # type: ignore[attr-defined] # no words at all: the help
            return BAD_INPUT
        raise InputError(_usage(error)) from None


def _usage(error: Any) -> str:
    """One line for a usage error."""
    told = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    path = error.ctx.command_path if error.ctx else "cclmpc"
    return f"{told[0].lower()}{told[1:]}{'' if told.endswith('?') else ':'} see `{path} --help`"


def main() -> None:
    """Run a verb and leave with its exit code: 0 done, 1 failed, 2 bad input, 75 preempted and saved."""
    # DDP warns whenever a step happens to use every parameter; the search it advises against is needed (runtime.start).
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own marks, below which it says nothing anyway
    try:
        sys.exit(_run())
    except InputError as error:
        if _unsaid(str(error)):
            for line in str(error).splitlines():
                print(f"cclmpc: {line}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
    except LostRanks as error:
        print(f"cclmpc: {error}", file=sys.stderr, flush=True)
        sys.exit(FAILED)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cclmpc_dist"):
            raise
        print(f"cclmpc: the package {error.name} is not installed: install cclmpc_dist with pip, or that package alone",
              file=sys.stderr, flush=True)  # fmt: skip
        sys.exit(BAD_INPUT)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"cclmpc: {error.filename}: {error.strerror}: name a place that can be used", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
