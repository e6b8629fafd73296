"""`cclmpc bench all`, the pages of every benchmark, `bench compare` of folders, and the README's plots."""

import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import toy
import typer
import yaml

from cclmpc_dist import cli_bench
from cclmpc_dist.benching import everything, files, pictures, tables
from cclmpc_dist.benching.everything import Outcome, Part
from cclmpc_dist.config import load
from cclmpc_dist.errors import InputError
from cclmpc_dist.records import repeated

ROOT = Path(__file__).resolve().parent.parent
META = {"machine": {"gpu": None, "cpu": "c", "cpus": 2}, "versions": {"torch": "2"}, "commit": "0",
        "command": ["cclmpc"]}  # fmt: skip


def report(bench: str, metric: str = "seconds", case: str = "x") -> dict[str, Any]:
    common = {"bench": bench, "case": case, "metric": metric, "unit": "s"}
    records = [common | {"variant": "ours"} | repeated([3.0, 1.0, 2.0]), common | {"variant": "theirs", "value": 4.0}]
    return {"meta": META, "records": records}


def test_what_is_repeated_keeps_its_samples_and_shows_its_spread(tmp_path: Path) -> None:
    one = report("eval")
    assert one["records"][0]["value"] == 2.0
    assert "| x | ours | seconds | 2 (1 - 3, 3) | s |" in tables.page(one)
    assert "| x | theirs | seconds | 4 | s |" in tables.page(one)
    assert pictures.draw(one, tmp_path / "a.png")
    assert not pictures.draw({"meta": META, "records": one["records"][1:]}, tmp_path / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_files_of_different_benchmarks_are_refused_and_folders_go_by_names(tmp_path: Path) -> None:
    for folder, one in (("a", report("eval")), ("b", report("loader"))):
        files.write(one, tmp_path / folder / "one.json")
        files.write(report("store"), tmp_path / folder / "store.json")
    with pytest.raises(InputError, match=r"have no record in common.*eval and loader.*compare files of one benchmark"):
        files.compare(tmp_path / "a" / "one.json", tmp_path / "b" / "one.json")
    files.write(report("step"), tmp_path / "b" / "new.json")
    said = files.compare(tmp_path / "a", tmp_path / "b")
    assert "have no record in common" in said
    assert "| x | ours | seconds | s | 2 | 2 | 1.000 |" in said
    assert f"{tmp_path / 'b'} alone has new.json" in said
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="no file of one name"):
        files.compare(tmp_path / "a", tmp_path / "c")


def test_all_benchmarks_are_there_with_options_that_they_know(tmp_path: Path) -> None:
    verbs: Any = typer.main.get_command(cli_bench.bench)
    for la in (None, Path("LA")):
        parts = [
            part
            for part in everything._parts(Path("c.yaml"), "toy", ["seed=1"], la, la, tmp_path, "shards")
            if isinstance(part, Part) and part.command[0] == "-m"
        ]
        for part in parts:
            assert part.command[:3] == ["-m", "cclmpc_dist", "bench"]
            verb, *arguments = part.command[3:]
            verbs.commands[verb].make_context(verb, [*arguments, "--out=x.json"])
        names = [part.name for part in parts]
        assert names == ["loader", "index_1m", "eval", "contrast", "checkpoint", "step_toy", "allreduce", "scale_toy"]
        assert parts[0].data.startswith("volumes of LA" if la else "phantoms, without --la")


def test_a_corpus_that_is_not_there_becomes_phantoms_in_words(toy_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(toy.settings(toy_corpus, tmp_path)))
    config, said = load(tmp_path / "c.yaml"), []
    assert everything._corpus(config, tmp_path, said.append) == (toy_corpus, f"shards of {toy_corpus}", [])
    config = load(tmp_path / "c.yaml", ["data.path=nowhere"])
    place, told, settings = everything._corpus(config, tmp_path, said.append)
    assert load(tmp_path / "c.yaml", settings).data.path == str(place)
    assert "nowhere holds no shards" in told
    assert "nowhere holds no shards" in said[0]


@pytest.mark.slow
def test_one_report_of_what_was_measured_what_failed_and_what_was_left_out(
    toy_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(toy.settings(toy_corpus, tmp_path, method="supervised")))
    step = ["-m", "cclmpc_dist", "bench", "step", str(tmp_path / "c.yaml"), "--steps=2"]
    listed = [
        Part("step_toy", step, "toy shards"),
        Part("eval", ["-m", "cclmpc_dist", "bench", "eval", "--la=nowhere"], "labels", 1),
        Outcome("plain_step", "left out: not here"),
    ]
    monkeypatch.setattr(everything, "_parts", lambda *_: listed)
    out, said = tmp_path / "out", []
    assert not everything.bench_all(tmp_path / "c.yaml", [], None, None, out, said.append)
    page = (out / "report.md").read_text()
    assert "| step_toy | toy shards |" in page
    assert "| eval | failed with exit code 2 |" in page
    assert "| plain_step | left out: not here |" in page
    assert "## bench step" in page
    assert "(step_toy.png)" in page
    assert files.read(out / "step_toy.json")["meta"]["command"][:3] == ["cclmpc", "bench", "step"]
    served = shutil.which("nginx") and shutil.which("curl")
    assert f"{3 if served else 2} benchmarks in 0:0" in said[-1]
    assert ("over curl" in page) if served else ("| store | left out: no" in page)


def figures() -> Any:
    """benchmarks/figures.py, which belongs to no package."""
    spec = spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_ratios_of_the_speed_plot_are_of_the_chosen_cases() -> None:
    """Four seconds over two; six crops a second over three, of the case that is named; nothing where a side lacks."""
    figure = figures()
    assert figure.ratios(figure.Row("", "", "ours", "theirs"), report("eval")) == [2.0]
    assert figure.ratios(figure.Row("", "", "ours", "absent"), report("eval")) == []
    rates = [("a", "ours", 6.0), ("a", "theirs", 3.0), ("b", "ours", 1.0), ("b", "theirs", 5.0)]
    records = [{"bench": "loader", "case": case, "variant": variant, "metric": "rate", "unit": "1/s", "value": value}
               for case, variant, value in rates]  # fmt: skip
    row = figure.Row("", "", "ours", "theirs", "rate", "a")
    assert figure.ratios(row, {"meta": META, "records": records}) == [2.0]


@pytest.mark.slow
def test_the_readmes_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", results)
    (results / "plain_step.json").unlink()
    (results / "contrast.json").unlink()
    command = [sys.executable, ROOT / "benchmarks" / "figures.py", "--results", results, "--out", tmp_path]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"contrast_memory.png: not drawn, there is no {results}/contrast.json" in said
    assert {path.name for path in tmp_path.glob("*.png")} == {"speed.png", "scaling.png"}


@pytest.mark.parametrize(("mode", "ranks"), [("strong", "1,2"), ("weak", "2,4")])
def test_a_prediction_needs_weak_scaling_and_one_rank(tmp_path: Path, mode: Any, ranks: str) -> None:
    absent = tmp_path / "absent.yaml"
    with pytest.raises(InputError, match="--predict rests on the step of one rank in weak scaling"):
        cli_bench.bench_scale(absent, ranks=ranks, mode=mode, predict=True)
    with pytest.raises(InputError, match=r"absent\.yaml"):
        cli_bench.bench_scale(absent, ranks=ranks, mode=mode)
