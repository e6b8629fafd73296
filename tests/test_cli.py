"""The verbs as a user types them: what they print, what they leave, how they fail."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import inputs
import pytest
import toy
import yaml

import cclmpc_dist
from cclmpc_dist import cli
from cclmpc_dist.data import phantom, shards

Inside = Callable[..., tuple[int, str]]


def cclmpc(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "cclmpc_dist", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def inside(
    alone: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """`cclmpc` in this process: exit code and what was printed."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cclmpc", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        shown = capfd.readouterr()
        return int(caught.value.code or 0), shown.out + shown.err

    return run


def write(folder: Path, raw: dict) -> Path:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_package_that_is_not_there_is_one_line(
    inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)  # as Python sees one that it cannot find
    code, printed = inside("shard", "2", "--format", "phantom", "--out", tmp_path / "new", "--workers", "1")
    assert code == 2
    assert printed.startswith("cclmpc: the package webdataset is not installed: install ")
    assert printed.count("\n") == 1


def test_version(inside: Inside) -> None:
    assert inside("--version") == (0, f"cclmpc_dist {cclmpc_dist.__version__}\n")


def test_from_corpus_to_report(tmp_path: Path, inside: Inside) -> None:
    cclmpc = inside
    shards, runs = tmp_path / "shards", tmp_path / "runs"
    code, said = cclmpc(
        "shard", "8", "--format", "phantom", "--out", shards, "--labelled", "2", "--val-last", "2", "--size", "32"
    )
    assert code == 0, said
    assert "8 cases in 1 shard, 2 labelled, 2 for reports only, 2 classes" in said
    assert cclmpc("verify", shards)[0] == 0
    assert json.loads(cclmpc("inspect", shards)[1])["samples"] == 8
    batches = {"data__batch_labelled": 2, "data__batch_unlabelled": 2}
    config = write(tmp_path, toy.settings(shards, runs, budget__images=20, ema=0.9, **batches))
    code, said = cclmpc("train", config)
    assert "`cclmpc eval` scores it" in said
    assert code == 0, said
    assert "starting at step 0" in said
    assert {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints"} <= set(
        os.listdir(runs / "toy")
    )
    code, said = cclmpc("eval", runs / "toy", "evaluation.stride=[16,16,16]")
    assert code == 0, said
    assert all(word in said for word in ("Dice", "Jaccard", "95HD", "ASD", "voxel", "mm", "step 5 (last), ema weights"))
    rows = (runs / "toy" / "eval" / "cases.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["case", "phantom-0006", "phantom-0007"]
    code, said = cclmpc("report", runs / "toy")
    assert code == 0, said
    page = (runs / "toy" / "report.html").read_text()
    assert "Dice" in page
    assert "data:image/" in page


def test_a_corpus_of_one_case_without_a_label_is_told_so(tmp_path: Path, inside: Inside) -> None:
    inputs.nifti(tmp_path / "in/a.nii", inputs.volume())
    shards = ("--out", tmp_path / "shards", "--workers", "1")
    assert (
        ": 1 case in 1 shard, 0 labelled, 0 for reports only, no labels\n"
        in inside("shard", tmp_path / "in", "--format", "nifti", *shards)[1]
    )


def test_cases_for_reports_that_nothing_can_be_scored_on_are_told(tmp_path: Path, inside: Inside) -> None:
    for number in range(3):
        inputs.nifti(tmp_path / f"in/{number}.nii", inputs.volume(number))
    inputs.nifti(tmp_path / "labels/0.nii", inputs.mask())
    words = ("shard", tmp_path / "in", "--format", "nifti", "--labels", tmp_path / "labels", "--workers", "1")
    assert "no case for reports has a label" in inside(*words, "--val-last", "1", "--out", tmp_path / "one")[1]
    assert "no case for reports" not in inside(*words, "--val-last", "3", "--out", tmp_path / "all")[1]


def test_evaluation_is_the_same_on_two_ranks(toy_corpus: Path, tmp_path: Path) -> None:
    config = write(tmp_path, toy.settings(toy_corpus, tmp_path, method="supervised", budget__images=12))
    assert cclmpc("train", config)[0] == 0
    run = tmp_path / "toy"
    assert cclmpc("eval", run)[0] == 0
    alone = (run / "eval" / "cases.csv").read_text()
    toy.run(2, "eval", str(run))
    assert (run / "eval" / "cases.csv").read_text() == alone


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot read"),
        (["verify", "nowhere"], "nowhere"),
        (["inspect", "nowhere"], "nowhere"),
        (["eval", "nowhere"], "nowhere: no run folder"),
        (["report", "nowhere"], "nowhere"),
        (["report", "{tmp}"], "no run folder: name one that `cclmpc train` wrote"),
        (["shard", "nowhere", "--format", "la-h5", "--out", "{tmp}/o"], "nowhere: no such folder"),
        (["shard", "{tmp}", "--format", "nifti", "--labels", "no", "--out", "{tmp}/o"], "--labels no: no such folder"),
        (["shard", "many", "--format", "phantom", "--out", "{tmp}/o"], "many: --format phantom takes a number"),
        (["shard", "3", "--format", "jpeg", "--out", "{tmp}/o"], "'phantom': see `cclmpc shard --help`"),
        (["doctor", "runs"], "unexpected extra argument(s) (runs): see `cclmpc doctor --help`"),
        (["train"], "missing argument 'config': see `cclmpc train --help`"),
        (["bench", "stp"], "no such command 'stp'"),
        (["trian"], "no such command 'trian'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], said: str, tmp_path: Path, inside: Inside) -> None:
    code, printed = inside(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 2, printed
    assert said in printed
    assert printed.startswith("cclmpc: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["bench"]])
def test_no_words_are_answered_with_the_help(words: list[str], inside: Inside) -> None:
    code, printed = inside(*words)
    assert code == 2
    assert "Commands:" in printed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__patch": [64, 64, 64]}, "data.patch = [64, 64, 64] is larger than every volume"),
        ({"data__labelled": 12}, "leaves no case for the unlabelled stream"),
        ({"data__labelled": 40}, "40"),
        ({"data__labelled": ["phantom-0001", "phantom-0O02"]}, "phantom-0O02"),
        ({"data__batch_labelled": 3, "precision": "fp16"}, "fp16 needs a GPU"),
        ({"data__patch": [32, 32], "evaluation": {"stride": [8, 8]}, "model__swin__window": [2, 2]}, "2 numbers"),
        ({"model__norm": "sync_batch"}, "sync_batch"),
    ],
)
def test_settings_that_do_not_fit_the_corpus(
    changes: dict, said: str, toy_corpus: Path, tmp_path: Path, inside: Inside
) -> None:
    code, printed = inside("train", write(tmp_path, toy.settings(toy_corpus, tmp_path, **changes)))
    assert code == 2, printed
    assert said in printed
    assert "Traceback" not in printed


def test_a_corpus_changed_under_a_run_is_refused(toy_corpus: Path, tmp_path: Path) -> None:
    raw = toy.settings(toy_corpus, tmp_path, method="supervised", budget__images=48, checkpoint__every_steps=1)
    config = write(tmp_path, raw)
    process = toy.launch(1, "train", str(config))
    toy.wait_for_step(process, tmp_path / "toy", 2)
    toy.kill(process)
    other = toy.corpus(tmp_path / "other", cases=12)
    code, printed = cclmpc("train", config, f"data.path={other}")
    assert code == 2, printed
    assert f"{other}: labelled order: " in printed
    assert "in the checkpoint" in printed


@pytest.mark.parametrize("override", ["optim.lr=3", "evaluation.every_steps=0", "evaluation_batch=2", "runs=x"])
def test_evaluation_takes_no_setting_in_silence(override: str, small_run: Path, inside: Inside) -> None:
    code, printed = inside("eval", small_run, "evaluation.batch=2", override)
    assert code == 2, printed
    assert printed.startswith(f"cclmpc: command line: {override.partition('=')[0]}: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("override", ["model.filters=8", "ema=0.9", "method=supervised"])
def test_evaluation_of_another_network_is_refused(override: str, small_run: Path, inside: Inside) -> None:
    code, printed = inside("eval", small_run, override)
    assert code == 2, printed
    assert "leave" in printed
    assert "Traceback" not in printed


def test_cases_without_labels_are_not_scored(small_run: Path, tmp_path: Path, inside: Inside) -> None:
    cases = [handle.read() for handle in phantom.cases(4, 0, 40)]
    for case in cases[2:]:
        case.label = None
    shards.write(cases, tmp_path / "other", source="phantom", val_last=2)
    code, printed = inside("eval", small_run, f"data.path={tmp_path / 'other'}", "data.labelled=2")
    assert code == 2
    assert "no case of the val split has a label to score against: shard it with its labels" in printed
    assert "Traceback" not in printed


def test_a_configuration_that_overrules_the_shards_says_so(toy_corpus: Path, tmp_path: Path, inside: Inside) -> None:
    """toy_corpus is sharded with --labelled 4."""
    config = write(tmp_path, toy.settings(toy_corpus, tmp_path, method="supervised", budget__images=6))
    said = "labelled: data.labelled takes {} cases, the shards say 4 (--labelled 4): the configuration holds"
    others = json.dumps([f"phantom-000{number}" for number in range(4, 8)])
    for labelled, takes in (("6", "6"), (others, "4 other"), ("4", "")):
        code, printed = inside("train", config, "--dry-run", f"data.labelled={labelled}")
        assert code == 0, printed
        assert (said.format(takes) in printed) == bool(takes)
        assert ("the shards say" in printed) == bool(takes)


@pytest.fixture(scope="module")
def small_run(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    assert cclmpc("train", write(folder, toy.settings(toy_corpus, folder, budget__images=12)))[0] == 0
    return folder / "toy"


def test_training_on_a_terminal_shows_a_bar(toy_corpus: Path, tmp_path: Path) -> None:
    config = write(tmp_path, toy.settings(toy_corpus, tmp_path, method="supervised", budget__images=24))
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cclmpc_dist", "train", str(config)], stderr=terminal, stdout=terminal
    )
    os.close(terminal)
    shown = b""
    while chunk := _read(main):
        shown += chunk
    assert process.wait(60) == 0, shown.decode()
    assert b"4/4" in shown
    assert "━".encode() in shown
    assert b"samples/s" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so when the other side has closed
        return b""


@pytest.mark.parametrize(
    ("arguments", "cases"),
    [
        (
            ["loader", "--repeats", "1", "--rivals", "gzip_h5", "--workers", "0", "--cases", "2", "--seconds", "0.1"],
            {"shards", "gzip_h5", "memcpy", "shards_zstd"},
        ),
        (["eval", "--volumes", "1", "--repeats", "1"], {"medpy", "ours"}),
        pytest.param(
            ["contrast", "--anchors", "64", "--keys", "256", "--features", "8", "--repeats", "1"],
            {"naive", "keys"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_benchmarks_write_records(arguments: list[str], cases: set[str], tmp_path: Path) -> None:
    code, printed = cclmpc("bench", *arguments, "--out", tmp_path / "b.json")
    assert code == 0, printed
    found = json.loads((tmp_path / "b.json").read_text())
    assert {"machine", "versions", "commit", "command"} <= found["meta"].keys()
    assert {record["variant"] for record in found["records"]} >= cases
    assert all(
        set(record) - {"samples"} == {"bench", "case", "variant", "metric", "value", "unit"}
        for record in found["records"]
    )


def test_benchmarks_refuse_what_is_not_there() -> None:
    assert "nowhere: holds no" in cclmpc("bench", "eval", "--la", "nowhere")[1]
    assert "--keys 1 is less than --anchors" in cclmpc("bench", "contrast", "--keys", "1")[1]
    assert "less than two for each of --classes 5" in cclmpc("bench", "contrast", "--anchors", "9", "--classes", "5")[1]


@pytest.mark.parametrize(
    ("harm", "said"),
    [({"shards": None}, "edited or damaged"), ({"classes": "two"}, "edited or damaged"), ({"classes": 0}, "edited")],
)
def test_an_edited_manifest_is_refused(harm: dict, said: str, toy_corpus: Path, tmp_path: Path, inside: Inside) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(toy_corpus, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | harm))
    for verb in ("verify", "inspect"):
        code, printed = inside(verb, folder)
        assert code == 2
        assert said in printed


def test_a_run_folder_that_is_a_file_is_told_in_one_line(toy_corpus: Path, tmp_path: Path, inside: Inside) -> None:
    (tmp_path / "toy").write_text("")
    code, printed = inside("train", write(tmp_path, toy.settings(toy_corpus, tmp_path)))
    assert code == 2
    assert "cannot write there" in printed
    (tmp_path / "out").write_text("")
    assert inside("shard", "2", "--format", "phantom", "--out", tmp_path / "out" / "below")[0] == 2
    assert "out: is a file" in inside("shard", "2", "--format", "phantom", "--out", tmp_path / "out")[1]


def test_ctrl_c_saves_and_goes_on(toy_corpus: Path, tmp_path: Path) -> None:
    config = write(tmp_path, toy.settings(toy_corpus, tmp_path, checkpoint__every_steps=0))
    process = toy.launch(1, "train", str(config))
    toy.wait_for_step(process, tmp_path / "toy", 2)
    process.send_signal(signal.SIGINT)
    code, printed = toy.finish(process)
    assert code == 75, printed
    assert "the same command goes on from there" in printed


def test_help_is_quick_to_load_and_names_every_verb() -> None:
    """Nothing heavy is imported for it."""
    code, said = cclmpc("--help")
    assert code == 0
    assert all(verb in said for verb in ("shard", "verify", "inspect", "train", "eval", "report", "doctor", "bench"))
    probe = (
        "import sys; import cclmpc_dist.cli; print(sorted({'torch', 'numpy', 'h5py', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_core_imports_where_ray_and_deepspeed_are_missing() -> None:
    probe = (
        "import sys\n"
        "for name in ('ray', 'deepspeed', 'monai', 'nibabel', 'nrrd', 'pydicom'): sys.modules[name] = None\n"
        "import cclmpc_dist.training.trainer, cclmpc_dist.models.swin, cclmpc_dist.evaluation.report\n"
        "import cclmpc_dist.data.sources\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_accelerate_launch_trains_on_two_ranks(toy_corpus: Path, tmp_path: Path) -> None:
    config = write(tmp_path, toy.settings(toy_corpus, tmp_path, method="supervised", budget__images=24))
    said = _accelerate("--multi_gpu", "--num_processes", "2", config=config)
    assert "on 2 processes" in said[1]
    assert said[0] == 0


def test_accelerate_launch_that_starts_one_process_is_refused(toy_corpus: Path, tmp_path: Path) -> None:
    """`--cpu --num_processes 2` starts one process without a word."""
    config = write(tmp_path, toy.settings(toy_corpus, tmp_path, method="supervised", budget__images=24))
    code, said = _accelerate("--cpu", "--num_processes", "2", config=config)
    assert code != 0
    assert "was asked for several processes and started one" in said


def _accelerate(*options: str, config: Path) -> tuple[int, str]:
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "cclmpc_dist"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *fixed, "train", str(config)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_package_imports_without_ray() -> None:
    """launch/ray_train.py alone needs it."""
    every = (
        "import sys, pkgutil, importlib, cclmpc_dist\nsys.modules['ray'] = None\n"
        "for module in pkgutil.walk_packages(cclmpc_dist.__path__, 'cclmpc_dist.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)"
    )
    done = subprocess.run([sys.executable, "-c", every], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
