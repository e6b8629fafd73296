"""Small files of every format, written with the formats' own libraries."""

from pathlib import Path
from typing import Any

import h5py
import nibabel
import nrrd
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SHAPE = (8, 7, 6)
AFFINE = np.diag([0.5, 0.75, 2.0, 1.0])  # RAS


def volume(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-900, 1200, shape).astype(np.int16)


def mask(seed: int = 0, shape: tuple[int, ...] = SHAPE, top: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top + 1, shape).astype(np.uint8)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, **fields: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine)
    for name, value in fields.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def nrrd_file(path: Path, array: np.ndarray, **header: Any) -> Path:
    """In LPS, as ITK writes it: the same place as AFFINE."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"space": "left-posterior-superior", "space directions": np.diag([-0.5, -0.75, 2.0])}
    nrrd.write(str(path), array, {**place, "space origin": np.zeros(3), **header})
    return path


def picture(path: Path, array: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def h5(path: Path, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values)
    return path


def slice_file(path: Path, pixels: np.ndarray, z: float, series: str, **tags: Any) -> Path:
    """One axial CT slice (rows, columns) of int16, slope 2, intercept -1000, 0.7 mm between columns, 0.8 rows."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    one = Dataset()
    one.file_meta = meta
    one.SOPClassUID, one.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    one.SeriesInstanceUID, one.PatientID, one.Modality = series, "somebody", "CT"
    one.ImagePositionPatient, one.ImageOrientationPatient = [10.0, 20.0, z], [1, 0, 0, 0, 1, 0]
    one.PixelSpacing, one.SliceThickness = [0.8, 0.7], 2.5
    one.Rows, one.Columns = pixels.shape
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
    one.RescaleSlope, one.RescaleIntercept = 2, -1000
    one.PixelData = np.ascontiguousarray(pixels, "<i2").tobytes()
    for name, value in tags.items():
        setattr(one, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, array: np.ndarray, places: tuple[float, ...] = (), **tags: Any) -> str:
    """Slices array[..., i] (columns, rows) at z = places[i]; file names in another order than positions."""
    uid = generate_uid()
    places = places or tuple(2.5 * i for i in range(array.shape[-1]))
    for number, z in enumerate(places):
        slice_file(folder / f"{(number * 5) % 7}-{number}.dcm", array[..., number].T, z, uid, **tags)
    return uid


def cut(path: Path, share: float = 0.5) -> None:
    """Truncate a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
