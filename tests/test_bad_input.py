"""What can be wrong with a corpus, as a user meets it: one line that names the file and what to do, exit code 2."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import inputs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1, generate_uid

from cclmpc_dist import cli

PAGE = Path(__file__).parents[1] / "docs/formats.md"
PHOTO = np.random.default_rng(0).integers(0, 256, (24, 20, 3)).astype(np.uint8)
Kind = Callable[[Path], tuple[list[str], list[str]]]  # a folder to fill -> (arguments of shard, words of the error)
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    """Registers a kind of bad input under its row in docs/formats.md."""

    def add(function: Kind) -> Kind:
        KINDS[name] = function
        return function

    return add


def volumes(folder: Path, count: int = 2, labels: bool = False) -> list[str]:
    """A sound NIfTI corpus; the arguments that name it."""
    for number in range(count):
        inputs.nifti(folder / f"images/c{number}.nii.gz", inputs.volume(number))
        if labels:
            inputs.nifti(folder / f"labels/c{number}.nii.gz", inputs.mask(number))
    return ["nifti", str(folder / "images"), *(["--labels", str(folder / "labels")] if labels else [])]


@kind("no such folder")
def _(folder):
    return ["nifti", str(folder / "nowhere")], ["nowhere", "no such folder", "name the one"]


@kind("empty folder")
def _(folder):
    return ["images", str(folder)], [str(folder), "holds no file that ends in .png", "name another folder"]


@kind("truncated .nii.gz")
def _(folder):
    arguments = volumes(folder)
    inputs.cut(folder / "images/c1.nii.gz", 0.9)
    return arguments, ["c1.nii.gz", "not a readable NIfTI file", "copy it again"]


@kind("truncated .nii")
def _(folder):
    inputs.cut(inputs.nifti(folder / "a.nii", inputs.volume()))
    return ["nifti", str(folder)], ["a.nii", "not a readable NIfTI file", "copy it again"]


@kind("truncated .nrrd")
def _(folder):
    inputs.cut(inputs.nrrd_file(folder / "a.nrrd", inputs.volume()))
    return ["nrrd", str(folder)], ["a.nrrd", "not a readable NRRD file", "copy it again"]


@kind("NRRD with its voxels in another file")
def _(folder):
    inputs.nrrd_file(folder / "a.nrrd", inputs.volume(), encoding="raw")
    text = (folder / "a.nrrd").read_bytes().replace(b"encoding: raw", b"encoding: raw\ndata file: ../../secret.raw")
    (folder / "a.nrrd").write_bytes(text)
    return ["nrrd", str(folder)], ["a.nrrd", "in another file", "as one .nrrd"]


@kind("text file with the wrong suffix")
def _(folder):
    (folder / "a.nii.gz").write_text("subject,age\nA,61\n" * 40)
    return ["nifti", str(folder)], ["a.nii.gz", "not a readable NIfTI file", "another format"]


@kind("NaN voxels")
def _(folder):
    sick = inputs.volume().astype(np.float32)
    sick[1, 2, 3] = np.nan
    arguments = volumes(folder)
    inputs.nifti(folder / "images/c1.nii.gz", sick)
    return arguments, ["c1.nii.gz", "NaN or infinity", "repair it or leave it out"]


@kind("spacing that is not finite")
def _(folder):
    inputs.nifti(folder / "a.nii", inputs.volume(), pixdim=[1, np.nan, 1, 1, 0, 0, 0, 0])
    return ["nifti", str(folder)], ["a.nii", "not finite", "repair the header"]


@kind("spacing of zero")
def _(folder):
    path = inputs.nrrd_file(folder / "a.nrrd", inputs.volume(), **{"space directions": np.diag([1.0, 1.0, 0.0])})
    return ["nrrd", str(folder)], [path.name, "spacing 1, 1, 0 mm", "repair the header"]


@kind("every voxel the same")
def _(folder):
    inputs.nifti(folder / "a.nii", np.full(inputs.SHAPE, 7, np.int16))
    return ["nifti", str(folder)], ["a.nii", "every voxel is 7", "leave it out"]


@kind("every voxel the same once it is clipped")
def _(folder):
    spot = np.zeros(inputs.SHAPE, np.int16)
    spot[0, 0, 0] = 900
    inputs.nifti(folder / "a.nii", spot)
    arguments = ["nifti", str(folder), "--normalise", "percentile:5,95"]
    return arguments, ["a.nii", "every voxel is 0 after the clip", "leave it out"]


@kind("voxels that are no real numbers")
def _(folder):
    inputs.nifti(folder / "a.nii", inputs.volume().astype(np.complex64))
    return ["nifti", str(folder)], ["a.nii", "voxels of type complex64", "save real numbers"]


@kind("NRRD in a space that is not known")
def _(folder):
    inputs.nrrd_file(folder / "a.nrrd", inputs.volume(), space="scanner-xyz")
    return ["nrrd", str(folder)], ["a.nrrd", "its space is scanner-xyz", "left-posterior-superior"]


@kind("four axes where three are expected")
def _(folder):
    inputs.nifti(folder / "a.nii", np.stack([inputs.volume(0), inputs.volume(1)], axis=-1))
    return ["nifti", str(folder)], ["a.nii", "(8, 7, 6, 2)", "--channels axis"]


@kind("a channel that is missing")
def _(folder):
    for name in ("a_0000", "a_0001", "b_0000"):
        inputs.nifti(folder / f"{name}.nii", inputs.volume())
    return ["nifti", str(folder), "--channels", "_0000,_0001"], ["b_0000.nii", "no file b_0001", "leave this out"]


@kind("channels in other numbers")
def _(folder):
    inputs.picture(folder / "a.png", PHOTO)
    inputs.picture(folder / "b.png", PHOTO[..., 0])
    return ["images", str(folder)], ["case b", "(1, 2), those before have (3, 2)", "make them alike"]


@kind("two files of one name")
def _(folder):
    inputs.nifti(folder / "a/scan.nii", inputs.volume())
    inputs.nifti(folder / "b/scan.nii", inputs.volume())
    return ["nifti", str(folder)], ["b/scan.nii", "the same case, scan, as", "rename one"]


@kind("a name that cannot be kept")
def _(folder):
    inputs.nifti(folder / "scan.v2.nii", inputs.volume())
    return ["nifti", str(folder)], ["case 'scan.v2'", "no dots", "rename it"]


@kind("a listed case that is not there")
def _(folder):
    arguments = volumes(folder)
    (folder / "train.list").write_text("c0\nc7\n")
    return [*arguments, "--list", str(folder / "train.list")], ["train.list", "case c7", "take it off the list"]


@kind("a list without names")
def _(folder):
    arguments = volumes(folder)
    (folder / "train.list").write_text("\n\n")
    return [*arguments, "--list", str(folder / "train.list")], ["train.list", "no cases", "one name a line"]


@kind("a list that is no text")
def _(folder):
    arguments = volumes(folder)
    (folder / "train.list").write_bytes(b"\xff\xfe\x00c0")
    return [*arguments, "--list", str(folder / "train.list")], ["train.list", "not UTF-8 text"]


@kind("label without an image")
def _(folder):
    arguments = volumes(folder, labels=True)
    inputs.nifti(folder / "labels/c9.nii.gz", inputs.mask())
    return arguments, ["c9.nii.gz", "a label without an image", "add the image or take the label away"]


@kind("images without the labels asked for")
def _(folder):
    arguments = volumes(folder, labels=True)
    for path in (folder / "labels").iterdir():
        path.rename(path.with_name(f"seg_{path.name}"))
    return arguments, ["labels", "no label fits an image", "c0.*", "--label-suffix"]


@kind("fewer labels than --labelled")
def _(folder):
    arguments = volumes(folder, labels=True)
    (folder / "labels/c1.nii.gz").unlink()
    return [*arguments, "--labelled", "2"], ["--labelled 2", "only 1 training cases have a label", "lower it"]


@kind("label of another shape")
def _(folder):
    arguments = volumes(folder, labels=True)
    inputs.nifti(folder / "labels/c1.nii.gz", inputs.mask(1, (8, 7, 5)))
    return arguments, ["labels/c1.nii.gz", "(8, 7, 5)", "(8, 7, 6)", "must be the same"]


@kind("label with channels")
def _(folder):
    arguments = volumes(folder, labels=True)
    inputs.nifti(folder / "labels/c1.nii.gz", inputs.mask(1, (*inputs.SHAPE, 2)))
    return arguments, ["labels/c1.nii.gz", "(8, 7, 6, 2)", "expected three axes"]


@kind("label in another place")
def _(folder):
    arguments = volumes(folder, labels=True)
    moved = inputs.AFFINE.copy()
    moved[0, 3] = 3.0
    inputs.nifti(folder / "labels/c1.nii.gz", inputs.mask(1), moved)
    return arguments, ["labels/c1.nii.gz", "lies 3 mm away", "resample it to the image"]


@kind("label values that are no classes")
def _(folder):
    arguments = volumes(folder, labels=True)
    inputs.nifti(folder / "labels/c1.nii.gz", inputs.mask(1) * 255)
    return arguments, ["labels/c1.nii.gz", "holds 0, 255", "--label-map, as in 0=0,255=1"]


@kind("label value that --label-map leaves out")
def _(folder):
    arguments = volumes(folder, labels=True)
    inputs.nifti(folder / "labels/c1.nii.gz", inputs.mask(1, top=2))
    return [*arguments, "--label-map", "0=0,1=1"], ["labels/c1.nii.gz", "holds 2", "add it there"]


@kind("label above --classes")
def _(folder):
    arguments = volumes(folder, labels=True)
    inputs.nifti(folder / "labels/c1.nii.gz", inputs.mask(1, top=3))
    return [*arguments, "--classes", "2"], ["labels/c1.nii.gz", "holds 0, 1, 2, 3", "0..1", "raise --classes"]


@kind("label between classes")
def _(folder):
    arguments = volumes(folder, labels=True)
    inputs.nifti(folder / "labels/c1.nii.gz", inputs.mask(1) * np.float32(0.5))
    return arguments, ["labels/c1.nii.gz", "whole numbers", "save class numbers"]


@kind("a class that no label has")
def _(folder):
    arguments = volumes(folder, labels=True)
    for number in range(2):
        inputs.nifti(folder / f"labels/c{number}.nii.gz", inputs.mask(number) * 2)
    return arguments, ["hold 2 and never 1", "--classes 3", "--label-map"]


@kind("a patient in both splits")
def _(folder):
    for number in range(3):
        image = np.arange(20, dtype=np.float32).reshape(4, 5)
        name = f"patient001_frame01_slice_{number}.h5"
        inputs.h5(folder / f"data/slices/{name}", image=image, label=inputs.mask(number, (4, 5)))
    return ["acdc-h5", str(folder), "--val-last", "1"], ["patient patient001", "--val-last", "parts no patient"]


@kind("no case left to train on")
def _(folder):
    return [*volumes(folder), "--val-last", "2"], ["--val-last 2", "none of 2 cases", "lower it"]


@kind("unreadable JPEG")
def _(folder):
    inputs.cut(inputs.picture(folder / "a.jpg", PHOTO))
    return ["images", str(folder)], ["a.jpg", "not a readable image", "truncated", "copy it again"]


@kind("TIFF of several pages")
def _(folder):
    pages = [Image.fromarray(PHOTO[..., 0])] * 2
    inputs.picture(folder / "a.tif", PHOTO[..., 0], save_all=True, append_images=pages)
    return ["images", str(folder)], ["a.tif", "3 pages", "a file of its own"]


@kind("transparency or a palette")
def _(folder):
    inputs.picture(folder / "a.png", np.concatenate([PHOTO, PHOTO[..., :1]], axis=-1))
    return ["images", str(folder)], ["a.png", "mode RGBA", "--channels rgb"]


@kind("mask in colours")
def _(folder):
    inputs.picture(folder / "images/a.png", PHOTO)
    inputs.picture(folder / "masks/a.png", PHOTO)
    arguments = ["images", str(folder / "images"), "--labels", str(folder / "masks")]
    return arguments, ["masks/a.png", "a mask in colours", "save one number a pixel"]


@kind("turned by EXIF")
def _(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    inputs.picture(folder / "a.jpg", PHOTO, exif=exif)
    return ["images", str(folder)], ["a.jpg", "EXIF orientation", "save it upright"]


@kind("HDF5 without an image")
def _(folder):
    inputs.h5(folder / "patient001_frame01_slice_1.h5", label=inputs.mask(0, (4, 5)))
    return ["acdc-h5", str(folder)], ["patient001_frame01_slice_1.h5", "holds no `image`", "--format"]


@kind("HDF5 truncated")
def _(folder):
    inputs.cut(inputs.h5(folder / "patient001_frame01_slice_1.h5", image=np.zeros((40, 50))))
    return ["acdc-h5", str(folder)], ["patient001_frame01_slice_1.h5", "not a readable HDF5 file", "fetch it again"]


@kind("HDF5 with other axes")
def _(folder):
    inputs.h5(folder / "patient001_frame01_slice_1.h5", image=np.zeros((3, 4, 5)))
    return ["acdc-h5", str(folder)], ["patient001_frame01_slice_1.h5", "(3, 4, 5)", "two axes"]


@kind("DICOM slice that is missing")
def _(folder):
    inputs.series(folder / "p1", inputs.volume(0, (9, 8, 5)), (0.0, 2.5, 7.5, 10.0, 12.5))
    return ["dicom", str(folder)], ["p1", "lies 5 mm after", "2.5 mm apart", "add it or leave the case out"]


@kind("DICOM slices in one place")
def _(folder):
    inputs.series(folder / "p1", inputs.volume(0, (9, 8, 4)), (0.0, 2.5, 2.5, 5.0))
    return ["dicom", str(folder)], ["p1", "lies where", "keep one of them"]


@kind("DICOM series mixed")
def _(folder):
    inputs.series(folder / "p1", inputs.volume(0, (9, 8, 4)))
    inputs.slice_file(folder / "p1/scout.dcm", inputs.volume(0, (8, 9)), 10.0, generate_uid())
    return ["dicom", str(folder)], ["scout.dcm", "SeriesInstanceUID", "one series a folder"]


@kind("DICOM of several frames")
def _(folder):
    inputs.slice_file(folder / "p1/a.dcm", inputs.volume(0, (8, 9)), 0.0, generate_uid(), NumberOfFrames=3)
    return ["dicom", str(folder)], ["p1/a.dcm", "several frames", "convert it to NIfTI"]


@kind("DICOM compressed beyond what is installed")
def _(folder):
    packed = encapsulate([b"\xff\xd8" + bytes(100)])
    tags = {"PixelData": packed, "syntax": JPEGLosslessSV1}
    inputs.slice_file(folder / "p1/a.dcm", inputs.volume(0, (8, 9)), 0.0, generate_uid(), **tags)
    return ["dicom", str(folder)], ["p1/a.dcm", "JPEG Lossless", "install pylibjpeg"]


@kind("DICOM truncated")
def _(folder):
    inputs.series(folder / "p1", inputs.volume(0, (9, 8, 3)))
    inputs.cut(folder / "p1/0-0.dcm", 0.95)
    return ["dicom", str(folder)], ["p1/0-0.dcm", "cannot be read", "copy it again"]


@kind("DICOM slice without a place")
def _(folder):
    inputs.series(folder / "p1", inputs.volume(0, (9, 8, 3)))
    path = folder / "p1/0-0.dcm"
    one = pydicom.dcmread(path)
    del one.ImagePositionPatient
    one.save_as(path)
    return ["dicom", str(folder)], ["p1/0-0.dcm", "has no ImagePositionPatient", "keep only the slices"]


@kind("bounds the wrong way round")
def _(folder):
    return [*volumes(folder), "--normalise", "window:240,-160"], ["--normalise window:240,-160", "below HIGH"]


@kind("a folder with other files")
def _(folder):
    (folder.parent / "out").mkdir()
    (folder.parent / "out/notes.txt").write_text("mine")
    return volumes(folder), ["out: is not empty", "give another --out"]


@kind("an option that means nothing there")
def _(folder):
    inputs.picture(folder / "a.png", PHOTO)
    return ["images", str(folder), "--spacing", "1,1,1"], ["--spacing", "images does not take it", "--resize"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cclmpc", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("name", KINDS)
def test_one_line_names_file_and_remedy(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (format_, source, *more), words = KINDS[name](tmp_path / "in")
    out = str(tmp_path / "out")
    code = run(monkeypatch, "shard", source, "--format", format_, "--out", out, "--workers", "1", *more)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cclmpc: ")]
    assert code == 2, said
    assert len(said) == 1
    for word in words:
        assert word in said[0]
    line = said[0].removeprefix("cclmpc: ").replace(f"{tmp_path}/in/", "").replace(f"{tmp_path}/", "")
    assert re.fullmatch(re.escape(rows()[name]).replace(r"\.\.\.", ".*"), line), "what the page says"


def rows() -> dict[str, str]:
    """docs/formats.md: the line of each kind; ... stands for anything."""
    table = PAGE.read_text().partition("## What is refused")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| (?!input|---)([^|]+?) \| (.+) \|$", table, re.MULTILINE))


def test_the_page_lists_every_kind() -> None:
    """In the order of this file."""
    assert list(rows()) == list(KINDS)


def test_one_bad_case_is_left_out_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = volumes(tmp_path, 3)
    inputs.cut(tmp_path / "images/c1.nii.gz")
    arguments = ["shard", source, "--format", "nifti", "--out", str(tmp_path / "out"), "--on-error", "skip"]
    assert run(monkeypatch, *arguments, "--workers", "1") == 0
    listed = (tmp_path / "out/skipped.json").read_text()
    assert "c1.nii.gz: not a readable NIfTI file" in listed
