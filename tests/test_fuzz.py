"""Shards and index with bytes that nobody wrote: every reader answers, or refuses with an InputError."""

import json
import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import inputs
import numpy as np
import pytest
from corpora import numbered, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cclmpc_dist.data import sources, verify
from cclmpc_dist.data.encode import encode
from cclmpc_dist.data.formats.options import Options
from cclmpc_dist.data.index import INDEX, MANIFEST, Index, sha256
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.errors import InputError

# The same examples on every run; without `derandomize` it looks further.
LIMITS = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)


@pytest.fixture(scope="module", params=["none", "zstd"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "out"
    write(folder, numbered(4, (4, 3, 3)), compress=request.param, shard_bytes=6000)
    return folder


def change(data: bytes, harm: list[tuple[int, bytes]], keep: float) -> bytes:
    """Some bytes overwritten, the end cut off."""
    found = bytearray(data)
    for place, new in harm:
        at = place % max(1, len(found))
        found[at : at + len(new)] = new
    return bytes(found[: int(len(found) * keep)])


HARM = st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=12)), max_size=6)
KEEP = st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.5, 0.01, 0.0])


def copied(corpus: Path, folder: str) -> Path:
    return Path(shutil.copytree(corpus, Path(folder) / "out"))


def believe(folder: Path) -> None:
    """Make the manifest agree with what lies there, so that no hash hides the readers."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["index_sha256"] = sha256(folder / INDEX)
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        shard |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def read_all(folder: Path) -> None:
    """Everything that reads a corpus. Whatever else than InputError is a fault."""
    problems = verify.verify(folder)
    assert all(isinstance(line, str) and "\n" not in line for line in problems)
    for look in (verify.inspect, verify.cases, samples):
        with suppress(InputError):
            list(look(Index.open(folder)) or [])


def samples(index: Index) -> None:
    reader = Reader(index)
    for row in range(len(index)):
        with suppress(InputError):
            assert index.find([index.key(row)]) == [row]
            image, label = reader.volume(row)
            assert image.ndim == 1 + index.dims
            assert label is None or label.shape == image.shape[1:]
            index.foreground(row)


@pytest.mark.slow
@LIMITS
@given(harm=HARM, keep=KEEP)
def test_an_index_of_any_bytes(corpus: Path, harm: list[tuple[int, bytes]], keep: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = copied(corpus, folder)
        (out / INDEX).write_bytes(change((out / INDEX).read_bytes(), harm, keep))
        believe(out)
        read_all(out)


EXTREMES = st.sampled_from(
    [-1, 0, 1, 2, 3, 127, 255, 1 << 20, (1 << 31) - 1, -(1 << 31), 1 << 40, -(1 << 62), np.nan, np.inf, -np.inf]
)


@pytest.mark.slow
@LIMITS
@given(
    column=st.integers(0, 20), place=st.integers(0, 1000), value=EXTREMES,
    form=st.sampled_from(["", "cut", "drop", "one"]),
)  # fmt: skip
def test_columns_of_any_values(corpus: Path, column: int, place: int, value: float, form: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = copied(corpus, folder)
        columns = load_file(out / INDEX)
        name = sorted(columns)[column]
        flat = columns[name].reshape(-1)
        with np.errstate(invalid="ignore"):
            flat[place % len(flat)] = np.array(value).astype(flat.dtype)
        columns |= {name: columns[name][:-1]} if form == "cut" else {}
        columns |= {name: columns[name].reshape(-1)[:1].reshape(())} if form == "one" else {}
        save_file({key: array for key, array in columns.items() if form != "drop" or key != name}, out / INDEX)
        believe(out)
        read_all(out)


@pytest.mark.slow
@LIMITS
@given(harm=HARM, keep=KEEP, which=st.integers(0, 5))
def test_shards_of_any_bytes(corpus: Path, harm: list[tuple[int, bytes]], keep: float, which: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = copied(corpus, folder)
        shards = sorted(out.glob("*.tar"))
        shard = shards[which % len(shards)]
        shard.write_bytes(change(shard.read_bytes(), harm, keep))
        believe(out)
        read_all(out)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 1 << 40)
    | st.floats()
    | st.text(max_size=6)
    | st.just("../../etc/passwd"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.slow
@LIMITS
@given(place=st.integers(0, 1000), value=JSON)
def test_a_manifest_of_any_values(corpus: Path, place: int, value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = copied(corpus, folder)
        manifest = json.loads((out / MANIFEST).read_text())
        shard = manifest["shards"][0]
        spots = [(manifest, name) for name in manifest] + [(shard, name) for name in shard]
        holder, name = spots[place % len(spots)]
        holder[name] = value
        (out / MANIFEST).write_text(json.dumps(manifest))
        read_all(out)


def test_a_shard_outside_the_folder_is_not_opened(corpus: Path, tmp_path: Path) -> None:
    """Not even where a file lies there, of the right size and hash."""
    out = Path(shutil.copytree(corpus, tmp_path / "out"))
    manifest = json.loads((out / MANIFEST).read_text())
    name = manifest["shards"][0]["name"]
    (out / name).rename(tmp_path / name)
    for place in (f"../{name}", str(tmp_path / name)):
        manifest["shards"][0]["name"] = place
        (out / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="edited or damaged"):
            Index.open(out)


def test_pickles_are_not_loaded(corpus: Path, tmp_path: Path) -> None:
    """An array of objects in place of an image: refused, and what it would run does not run."""
    out = Path(shutil.copytree(corpus, tmp_path / "out"))
    index = Index.open(out)
    shard, at, size = out / index.manifest["shards"][0]["name"], int(index["image_at"][0]), int(index["image_bytes"][0])
    data = bytearray(shard.read_bytes())
    mark = tmp_path / "ran"
    bomb = (
        np.lib.format.magic(1, 0)
        + b"v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(120)
        + (f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    )
    data[at : at + size] = bomb[:size].ljust(size, b".")
    shard.write_bytes(data)
    believe(out)
    assert any("image cannot be read" in line for line in verify.verify(out))
    with pytest.raises(InputError):
        Reader(Index.open(out)).image(0)
    assert not mark.exists()


PHOTO = np.random.default_rng(0).integers(0, 256, (12, 10, 3)).astype(np.uint8)
SOUND = {  # file name -> what writes it
    "a.nii.gz": lambda path: inputs.nifti(path, inputs.volume()),
    "a.nii": lambda path: inputs.nifti(path, inputs.volume()),
    "a.nrrd": lambda path: inputs.nrrd_file(path, inputs.volume()),
    "raw.nrrd": lambda path: inputs.nrrd_file(path, inputs.volume(), encoding="raw"),
    "a.dcm": lambda path: inputs.slice_file(path, inputs.volume(0, (9, 8)), 0.0, "1.2.3"),
    "a.png": lambda path: inputs.picture(path, PHOTO),
    "a.jpg": lambda path: inputs.picture(path, PHOTO),
    "a.tif": lambda path: inputs.picture(path, PHOTO),
}
FORMATS = {".gz": "nifti", ".nii": "nifti", ".nrrd": "nrrd", ".dcm": "dicom"}


@pytest.fixture(scope="module", params=SOUND)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SOUND[request.param](tmp_path_factory.mktemp("source") / request.param)


@pytest.mark.slow
@settings(parent=LIMITS, max_examples=250)
@given(harm=st.lists(st.tuples(st.integers(0, 900), st.binary(min_size=1, max_size=6)), max_size=4), keep=KEEP)
def test_source_files_of_any_bytes(source: Path, harm: list[tuple[int, bytes]], keep: float) -> None:
    """Each is read, or refused in words."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / source.name).write_bytes(change(source.read_bytes(), harm, keep))
        with suppress(InputError):
            for handle in sources.cases(FORMATS.get(source.suffix, "images"), folder, None, Options()):
                encode(handle, None, "none")
