"""Bad input to `cclmpc shard`, by kind: images, HDF5, DICOM and options."""

import inputs
import numpy as np
import pydicom
from bad_volumes import PHOTO, kind, volumes
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1, generate_uid


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
