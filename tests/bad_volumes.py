"""Bad input to `cclmpc shard`, by kind: the corpus as a whole, volumes, lists and labels."""

from collections.abc import Callable
from pathlib import Path

import inputs
import numpy as np
from kinds import registering

PHOTO = np.random.default_rng(0).integers(0, 256, (24, 20, 3)).astype(np.uint8)
Kind = Callable[[Path], tuple[list[str], list[str]]]  # a folder to fill -> (arguments of shard, words of the error)
KINDS: dict[str, Kind] = {}
kind = registering(KINDS)


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


@kind("a label among the images")
def _(folder):
    arguments = volumes(folder)
    inputs.nifti(folder / "images/c0_seg.nii.gz", inputs.mask())
    return arguments, ["c0_seg.nii.gz", "looks like the label of c0", "give --label-suffix _seg"]


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
