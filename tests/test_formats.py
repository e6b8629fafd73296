"""Each format: the values, the place in space and the labels that the shards then hold."""

import io
import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import inputs
import nibabel
import numpy as np
import pytest
import toy
import yaml
from PIL import Image
from pydicom.uid import RLELossless

from cclmpc_dist import cli
from cclmpc_dist.data import shards, sources, verify
from cclmpc_dist.data.formats.labels import parse_map, to_classes
from cclmpc_dist.data.formats.normalise import Rule, normalise, parse_rule
from cclmpc_dist.data.formats.options import Options
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation import pictures

PLAIN = Rule("none")


def cases(name: str, folder: Path, list_file: Path | None = None, **options: Any) -> list[Any]:
    return [handle.read() for handle in sources.cases(name, folder, list_file, Options(**options))]


def corpus(name: str, folder: Path, out: Path, **options: Any) -> Index:
    return shards.write(sources.cases(name, folder, None, Options(**options)), out, source=name)


def meta(index: Index, row: int) -> dict[str, Any]:
    start, size = int(index["json_at"][row]), int(index["json_bytes"][row])
    return json.loads(index.shard_path(int(index["shard"][row])).read_bytes()[start : start + size])


@pytest.mark.parametrize("name", ["nifti", "nrrd"])
def test_a_volume_keeps_values_labels_and_place(name: str, tmp_path: Path) -> None:
    """Whole numbers are stored as they are; mean and deviation are the index's, applied on the device."""
    write, ending = {"nifti": (inputs.nifti, ".nii.gz"), "nrrd": (inputs.nrrd_file, ".nrrd")}[name]
    for number in range(3):
        write(tmp_path / f"in/images/c{number}{ending}", inputs.volume(number))
    for number in range(2):
        write(tmp_path / f"in/labels/c{number}{ending}", inputs.mask(number))
    index = corpus(name, tmp_path / "in/images", tmp_path / "out", labels=tmp_path / "in/labels")
    reader = Reader(index)
    assert [index.key(row) for row in range(3)] == ["c0", "c1", "c2"]
    assert index.manifest["counts"]["with_label"] == 2
    for row in range(3):
        image = inputs.volume(row)
        np.testing.assert_array_equal(reader.image(row)[0], image)
        assert reader.image(row).dtype == np.int16
        np.testing.assert_allclose(reader.normalised(row)[0], (image - image.mean()) / image.std(), atol=1e-5)
        assert index["spacing"][row].tolist() == [0.5, 0.75, 2.0]
        assert meta(index, row)["affine"] == inputs.AFFINE.tolist()
        assert meta(index, row)["axes"] == "RAS"
        assert meta(index, row)["normalisation"]["mean"] == [pytest.approx(image.mean())]
    np.testing.assert_array_equal(reader.label(1), inputs.mask(1))


def test_labels_below_the_images_are_no_images_however_the_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        inputs.nifti(tmp_path / f"in/c{number}.nii.gz", inputs.volume(number))
        inputs.nifti(tmp_path / f"in/labels/c{number}_seg.nii.gz", inputs.mask(number))
    monkeypatch.chdir(tmp_path)
    for labels in (tmp_path / "in/labels", Path("in/labels"), Path("in/../in/labels")):
        for folder in (Path("in"), tmp_path / "in"):
            found = cases("nifti", folder, labels=labels, label_suffix="_seg")
            assert [case.key for case in found] == ["c0", "c1"]
            assert all(case.label is not None for case in found)


def test_other_labels_and_labels_that_changed_make_another_corpus(tmp_path: Path) -> None:
    """Of the same names and sizes."""
    for number in range(3):
        inputs.nifti(tmp_path / f"in/c{number}.nii", inputs.volume(number))
        for kind in "ab":
            inputs.nifti(tmp_path / f"{kind}/c{number}.nii", inputs.mask(number))

    def handles(kind: str) -> Any:
        return sources.cases("nifti", tmp_path / "in", None, Options(labels=tmp_path / kind))

    one, other = ([handle.fingerprint for handle in handles(kind)] for kind in "ab")
    assert one != other
    options = [Options(labels=tmp_path / kind).given() for kind in "ab"]
    assert options[0] != options[1]


def test_a_volume_is_turned_to_stated_axes(tmp_path: Path) -> None:
    turned = np.array([[0, 0, -2.0, 5], [0.5, 0, 0, 6], [0, -0.75, 0, 7], [0, 0, 0, 1]])  # axes A, I, L
    inputs.nifti(tmp_path / "in/c.nii", inputs.volume(), turned)
    inputs.nifti(tmp_path / "labels/c_seg.nii", inputs.mask(), turned)
    options: dict[str, Any] = {"labels": tmp_path / "labels", "label_suffix": "_seg", "normalise": PLAIN}
    case = cases("nifti", tmp_path / "in", **options)[0]
    np.testing.assert_array_equal(case.image[0], inputs.volume().transpose(2, 0, 1)[::-1, :, ::-1])
    np.testing.assert_array_equal(case.label, inputs.mask().transpose(2, 0, 1)[::-1, :, ::-1])
    assert case.spacing == (2.0, 0.5, 0.75)
    assert nibabel.orientations.aff2axcodes(case.meta["affine"]) == ("R", "A", "S")
    voxel = np.array([3, 2, 1])
    mm = turned @ [*voxel, 1]
    back = np.linalg.solve(case.meta["affine"], mm)[:3].round().astype(int)
    assert case.image[0][tuple(back)] == inputs.volume()[tuple(voxel)], "the same place holds the same value"
    kept = cases("nifti", tmp_path / "in", orient="keep", **options)[0]
    np.testing.assert_array_equal(kept.image[0], inputs.volume())
    assert kept.meta["axes"] == "AIL"


def test_resampling_keeps_a_ramp_and_the_labels_values(tmp_path: Path) -> None:
    """Of a linear ramp in mm, every voxel's value follows from its new place."""
    ramp = np.broadcast_to(100 * np.arange(8)[:, None, None], (8, 7, 6)).astype(np.int16)
    inputs.nifti(tmp_path / "in/c.nii", ramp, np.diag([1.0, 1, 1, 1]))
    inputs.nifti(tmp_path / "labels/c.nii", (ramp >= 400).astype(np.uint8) * 3, np.diag([1.0, 1, 1, 1]))
    case = cases("nifti", tmp_path / "in", labels=tmp_path / "labels", spacing=(0.5, 1.0, 2.0), normalise=PLAIN)[0]
    assert case.image.shape == (1, 16, 7, 3)
    assert case.spacing == pytest.approx((0.5, 1.0, 2.0))
    assert case.image.dtype == np.int16
    x = (np.array(case.meta["affine"]) @ np.stack([np.arange(16), 0 * np.arange(16), 0 * np.arange(16), np.ones(16)]))[
        0
    ]
    np.testing.assert_array_equal(case.image[0][:, 3, 1], np.clip(100 * x, 0, 700).round())
    assert set(np.unique(case.label)) == {0, 3}
    np.testing.assert_array_equal(case.label[:, 0, 0] > 0, np.arange(16) >= 8)


def test_channels_from_files_and_from_the_fourth_axis(tmp_path: Path) -> None:
    for number, name in enumerate(("_t1", "_t2")):
        inputs.nifti(tmp_path / f"in/p/p{name}.nii.gz", inputs.volume(number))
    inputs.nifti(tmp_path / "in/p/p_seg.nii.gz", inputs.mask())
    apart = cases("nifti", tmp_path / "in", channels=("_t1", "_t2"), label_suffix="_seg", normalise=PLAIN)[0]
    assert apart.key == "p"
    assert apart.label is not None
    np.testing.assert_array_equal(apart.image, np.stack([inputs.volume(0), inputs.volume(1)]))
    both = np.stack([inputs.volume(0), inputs.volume(1)], axis=-1)
    inputs.nifti(tmp_path / "four/p.nii", both)
    joined = cases("nifti", tmp_path / "four", channels=("axis",), normalise=PLAIN)[0]
    np.testing.assert_array_equal(joined.image, apart.image)
    directions = np.array([[np.nan] * 3, [-0.5, 0, 0], [0, -0.75, 0], [0, 0, 2.0]])
    vectors = np.moveaxis(both, -1, 0)
    inputs.nrrd_file(tmp_path / "vectors/p.nrrd", vectors, **{"space directions": directions})
    case = cases("nrrd", tmp_path / "vectors", channels=("axis",), normalise=PLAIN)[0]
    np.testing.assert_array_equal(case.image, apart.image)
    assert case.meta["affine"] == joined.meta["affine"]


def test_a_name_that_is_all_suffix_takes_its_folders_name(tmp_path: Path) -> None:
    """The Atrial Segmentation Challenge's own layout."""
    for key in ("A1", "B2"):
        inputs.nrrd_file(tmp_path / key / "lgemri.nrrd", inputs.volume())
        inputs.nrrd_file(tmp_path / key / "laendo.nrrd", inputs.mask() * 255)
    found = cases("nrrd", tmp_path, channels=("lgemri",), label_suffix="laendo", label_map=parse_map("0=0,255=1"))
    assert [case.key for case in found] == ["A1", "B2"]
    np.testing.assert_array_equal(found[0].label, inputs.mask())


def test_dicom_is_sorted_rescaled_and_placed(tmp_path: Path) -> None:
    pixels = inputs.volume(0, (9, 8, 5))
    inputs.series(tmp_path / "in/p1", pixels)
    inputs.series(tmp_path / "in/p2/scan", pixels[..., :3], (5.0, 0.0, 2.5))
    one, two = cases("dicom", tmp_path / "in", normalise=PLAIN)
    assert (one.key, two.key) == ("p1", "p2_scan")
    values = 2 * pixels.astype(int) - 1000  # columns, rows, slices: L, P, S; RAS turns the first two
    np.testing.assert_array_equal(one.image[0], values[::-1, ::-1])
    np.testing.assert_array_equal(two.image[0], values[::-1, ::-1, [1, 2, 0]])
    assert one.spacing == pytest.approx((0.7, 0.8, 2.5))
    assert (np.array(one.meta["affine"]) @ [8, 7, 0, 1])[:3] == pytest.approx([-10, -20, 0])
    assert "somebody" not in json.dumps(one.meta)
    assert one.meta["patient"] == two.meta["patient"] != "p1"


def test_dicom_takes_labels_from_nifti_and_compressed_slices(tmp_path: Path) -> None:
    from pydicom import dcmread

    pixels = inputs.volume(0, (9, 8, 5))
    inputs.series(tmp_path / "in/p1", pixels)
    plain = cases("dicom", tmp_path / "in", normalise=PLAIN)[0]
    for path in (tmp_path / "in/p1").iterdir():
        packed = dcmread(path)
        packed.compress(RLELossless)
        packed.save_as(path, enforce_file_format=True)
    label = inputs.mask(0, (9, 8, 5))
    inputs.nifti(tmp_path / "labels/p1.nii.gz", label, np.array(plain.meta["affine"]))
    case = cases("dicom", tmp_path / "in", labels=tmp_path / "labels", normalise=PLAIN)[0]
    np.testing.assert_array_equal(case.image, plain.image)
    np.testing.assert_array_equal(case.label, label)


def test_images_with_masks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (12, 10, 3)).astype(np.uint8)
    inputs.picture(tmp_path / "in/ISIC_1.png", photo)
    inputs.picture(tmp_path / "in/ISIC_2.tif", photo)
    inputs.picture(tmp_path / "in/ISIC_10.jpg", photo)
    inputs.picture(tmp_path / "masks/ISIC_1_segmentation.png", inputs.mask(0, (12, 10)) * 255)
    inputs.picture(tmp_path / "masks/ISIC_2_segmentation.png", np.repeat(inputs.mask(1, (12, 10, 1)) * 255, 3, axis=2))
    options: dict[str, Any] = {
        "labels": tmp_path / "masks", "label_suffix": "_segmentation", "label_map": parse_map("0..127=0,128..255=1"),
    }  # fmt: skip
    index = corpus("images", tmp_path / "in", tmp_path / "out", **options)
    reader = Reader(index)
    assert [index.key(row) for row in range(3)] == ["ISIC_1", "ISIC_2", "ISIC_10"]
    assert (index.dims, index.channels, index.classes) == (2, 3, 2)
    assert (index["dtype"] == 0).all(), "photographs stay 8 bit"
    np.testing.assert_array_equal(reader.image(0), photo.transpose(2, 0, 1))
    np.testing.assert_array_equal(reader.label(1), inputs.mask(1, (12, 10, 1))[..., 0])
    np.testing.assert_allclose(reader.normalised(0), (photo.transpose(2, 0, 1) - photo.mean()) / photo.std(), atol=1e-5)
    small = cases("images", tmp_path / "in", resize=(6, 5), channels=("grey",), **options)[0]
    assert (small.image.shape, small.label.shape) == ((1, 6, 5), (6, 5))
    assert small.image.dtype == np.uint8
    assert abs(float(small.image.mean()) - photo.mean()) < 12
    assert set(np.unique(small.label)) == {0, 1}


def test_sixteen_bit_grey_stays(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 1 << 16, (9, 8)).astype(np.uint16)
    for ending in ("png", "tif"):
        inputs.picture(tmp_path / f"in_{ending}/a.{ending}", grey)
        index = corpus("images", tmp_path / f"in_{ending}", tmp_path / ending, normalise=PLAIN)
        assert index["dtype"].tolist() == [1]
        np.testing.assert_allclose(Reader(index).normalised(0)[0], grey, atol=0.01)


@pytest.mark.parametrize("place", ["data/slices", "ACDC_training_slices", ""])
def test_acdc_slices_follow_a_patient_wise_list(place: str, tmp_path: Path) -> None:
    for patient in (1, 2, 10):
        for number in (0, 2, 10):
            image = np.full((4, 5), patient, np.float32) + np.arange(5, dtype=np.float32) / 255
            name = f"patient{patient:03d}_frame01_slice_{number}.h5"
            inputs.h5(tmp_path / place / name, image=image, label=inputs.mask(number, (4, 5), 3))
    (tmp_path / "train.list").write_text("patient010\npatient001_frame01\npatient002_frame01_slice_2\n")
    found = cases("acdc-h5", tmp_path, tmp_path / "train.list")
    slices = [f"patient010_frame01_slice_{n}" for n in (0, 2, 10)] + [
        f"patient001_frame01_slice_{n}" for n in (0, 2, 10)
    ]
    assert [case.key for case in found] == [*slices, "patient002_frame01_slice_2"]
    assert [case.meta["patient"] for case in found] == ["patient010"] * 3 + ["patient001"] * 3 + ["patient002"]
    assert found[0].image.shape == (1, 4, 5)
    assert len(cases("acdc-h5", tmp_path)) == 9


def test_acdc_volumes_end_in_the_slice_axis(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((3, 4, 5), np.float32)
    inputs.h5(tmp_path / "data/patient001_frame01.h5", image=image, label=inputs.mask(0, (3, 4, 5), 3))
    inputs.h5(tmp_path / "data/slices/patient001_frame01_slice_0.h5", image=image[0], label=inputs.mask(0, (4, 5)))
    (case,) = cases("acdc-h5-volumes", tmp_path)
    np.testing.assert_array_equal(case.image[0], image.transpose(1, 2, 0))
    assert case.label.shape == (4, 5, 3)


def test_a_window_becomes_zero_to_one() -> None:
    image = np.array([[-1000, -160, 40, 240, 3000]], np.int16)
    found = normalise(image, parse_rule("window:-160,240"), Path("f"))
    assert found.image is image
    assert (found.seen.low, found.seen.high) == (-160, 240)
    np.testing.assert_allclose(found.seen.applied(image), [[0, 0, 0.5, 1, 1]], atol=1e-7)
    assert found.said == {"clip": [[-160.0, 240.0]], "rule": "window:-160,240"}
    bright = normalise(np.array([[0, 255]], np.uint8), parse_rule("window:-5,300"), Path("f"))
    beyond = "bounds beyond what the type holds"
    np.testing.assert_allclose(bright.seen.applied(bright.image), [[5 / 305, 260 / 305]], rtol=1e-6, err_msg=beyond)
    narrow = normalise(np.array([[0, 1]], np.int16), parse_rule("window:0.25,0.75"), Path("f"))
    np.testing.assert_allclose(narrow.seen.applied(narrow.image), [[0, 1]], err_msg="bounds between whole numbers")


def test_percentiles_are_voxels_of_the_image() -> None:
    image = np.arange(1001, dtype=np.int16)[None]
    found = normalise(image, parse_rule("percentile:1,99"), Path("f"))
    assert (found.seen.low, found.seen.high) == (10, 990)
    assert found.image is image
    values = found.seen.applied(image)
    assert (values.mean(), values.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1))
    sparse = normalise(np.array([[0, 0, 0, 7, 100]], np.int16), parse_rule("percentile:0,80"), Path("f"))
    assert sparse.seen.high == 7, "not a value between 7 and 100"


@pytest.mark.parametrize(
    ("rule", "words"),
    [("z", "take none"), ("zscore:1,2", "take none"), ("window", "take none"), ("window:5,-5", "LOW must be below"),
     ("percentile:-1,50", "in 0..100"), ("window:nan,1", "take none")],
)  # fmt: skip
def test_rules_that_make_no_sense(rule: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_rule(rule)


@pytest.mark.parametrize("text", ["", "1", "a=1", "0=0,0=1", "5..1=0", "0=300", "0..9=0,5=1", "1=-1"])
def test_label_maps_that_make_no_sense(text: str) -> None:
    with pytest.raises(InputError, match="--label-map"):
        parse_map(text)


def test_label_values_become_classes() -> None:
    label = np.array([0, 500, 600, 205], np.int16)
    assert to_classes(label, parse_map("0=0,205=3,500=1,600=2"), None, Path("f")).tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"holds 0, 205, 500, 600, and classes are 0\.\.127"):
        to_classes(label, None, None, Path("f"))
    with pytest.raises(InputError, match="holds 600, which --label-map"):
        to_classes(label, parse_map("0=0,205=3,500=1"), None, Path("f"))
    with pytest.raises(InputError, match="whole numbers"):
        to_classes(np.array([0.5]), None, None, Path("f"))


def test_a_gap_in_the_classes_is_told(tmp_path: Path) -> None:
    inputs.nifti(tmp_path / "in/a.nii", inputs.volume())
    inputs.nifti(tmp_path / "labels/a.nii", inputs.mask() * 4)
    with pytest.raises(InputError, match="the labels hold 4 and never 1: say --classes 5"):
        corpus("nifti", tmp_path / "in", tmp_path / "out", labels=tmp_path / "labels")


def test_options_that_mean_nothing_to_a_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--spacing: --format images does not take it, only --channels, --label-map"):
        sources.cases("images", tmp_path, None, Options(spacing=(1.0, 1.0, 1.0)))


def test_inspect_counts_and_draws(tmp_path: Path) -> None:
    for number in range(3):
        inputs.nifti(tmp_path / f"in/c{number}.nii", inputs.volume(number))
        inputs.nifti(tmp_path / f"labels/c{number}.nii", inputs.mask(number, top=2) * (number > 0))
    index = corpus("nifti", tmp_path / "in", tmp_path / "out", labels=tmp_path / "labels")
    found = verify.inspect(index)
    assert found["samples_with_class"] == [2, 2]
    histogram = found["histogram"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert 0.95 < sum(histogram["counts"]) / (3 * np.prod(inputs.SHAPE)) <= 1, "between the 1st and 99th percentile"
    with Image.open(io.BytesIO(pictures.sheet(verify.sheet(index)))) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 100


def test_a_photograph_is_drawn_upright() -> None:
    """Bright at the top left: so it must be in the picture."""
    image = np.zeros((40, 60), np.uint8)
    image[:20, :30] = 255
    empty = np.zeros_like(image)
    with Image.open(io.BytesIO(pictures.overlay(image, empty, empty, (1.0, 1.0)))) as picture:
        drawn = np.asarray(picture.convert("L"))
    assert drawn.shape[1] > drawn.shape[0]
    quarter = drawn[drawn.shape[0] // 4, drawn.shape[1] // 4], drawn[-drawn.shape[0] // 4, drawn.shape[1] // 4]
    assert quarter == (255, 0)


def test_photographs_from_shards_to_a_report(
    tmp_path: Path, alone: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All verbs in 2D, with three channels."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["cclmpc", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capfd.readouterr()
        assert not caught.value.code, said.out + said.err
        return said.out

    rng = np.random.default_rng(0)
    for number in range(8):
        lesion = np.zeros((40, 36), bool)
        lesion[8:24, 10 : 20 + number] = True
        photo = rng.normal(150, 20, (40, 36, 3)) - 60 * lesion[..., None]
        inputs.picture(tmp_path / f"in/i{number}.jpg", photo.clip(0, 255).astype(np.uint8))
        inputs.picture(tmp_path / f"masks/i{number}.png", lesion.astype(np.uint8) * 255)
    shards, masks = str(tmp_path / "shards"), str(tmp_path / "masks")
    said = run(
        "shard", str(tmp_path / "in"), "--format", "images", "--labels", masks, "--label-map", "0=0,255=1",
        "--resize", "40,40", "--labelled", "3", "--val-last", "2", "--out", shards, "--workers", "1",
    )  # fmt: skip
    assert "8 cases in 1 shard, 3 labelled, 2 for reports only" in said
    run("verify", shards)
    assert json.loads(run("inspect", shards))["spacing_unit"] == "pixel"
    changes = {"data__patch": [32, 32], "model__swin__window": [2, 2], "budget__images": 24}
    batches = {"data__batch_labelled": 2, "data__batch_unlabelled": 2, "ccl_mpc__t_contrast": 0.3}
    raw = toy.settings(Path(shards), tmp_path, **changes, **batches)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    run("train", str(tmp_path / "c.yaml"))
    assert "NSD at 1 pixel" in (table := run("eval", str(tmp_path / "toy")))
    run("report", str(tmp_path / "toy"))
    page = (tmp_path / "toy/report.html").read_text().partition("Evaluation<")[2].partition("Origins")[0]
    assert all(words in page for words in ("HD95, pixel", "data:image/png"))
    assert not re.search(r"\bmm\b|\bvoxels?\b", table + re.sub("<[^>]+>", " ", page)), "its spacing is of pixels"


def test_the_verb_offers_every_format() -> None:
    offered = get_args(get_args(get_type_hints(cli.shard, include_extras=True)["format"])[0])
    assert set(offered) == {*sources.FORMATS, "phantom"}
