"""A folder of DICOM slices a case (pydicom) -> Cases: sorted by position, rescaled, whole series only."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cclmpc_dist.data.case import Case
from cclmpc_dist.data.formats import volumes
from cclmpc_dist.data.formats.files import UNREADABLE, Files, by_key, find, listed, natural
from cclmpc_dist.data.formats.geometry import Volume
from cclmpc_dist.data.formats.options import Options
from cclmpc_dist.errors import InputError

ENDINGS = (".dcm", ".ima")
UNEVEN = 0.05  # share of the usual gap between slices by which one may differ [F]
_NEEDED = ("SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
_USED = (
    "PatientID", "Modality", "NumberOfFrames", "SliceThickness", "RescaleSlope", "RescaleIntercept", "PixelData",
    "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
_LPS = np.diag([-1.0, -1, 1, 1])


class Series(Files):
    """A case of one file a slice."""

    def read(self) -> Case:
        slices = [_slice(path) for path in self.images]
        _check_alike(slices, self.images)
        order = np.argsort([_place(one) for one in slices], kind="stable")
        slices, paths = [slices[i] for i in order], [self.images[i] for i in order]
        step = _step([_place(one) for one in slices], paths, slices[0])
        array = np.stack([_values(one, path) for one, path in zip(slices, paths, strict=True)], axis=-1)
        patient = hashlib.sha256(str(slices[0].get("PatientID") or self.key).encode()).hexdigest()[:16]
        extra = {"patient": patient, "modality": str(slices[0].get("Modality", ""))}
        return volumes.case(self, Volume(array, _affine(slices[0], step), paths[0].parent).checked(), extra)


def dicom(folder: str | Path, list_file: str | Path | None, options: Options) -> list[Files]:
    """A case for each folder with slices below `folder`, which may be one itself. Raises InputError."""
    folder = Path(folder)
    series: dict[Path, list[Path]] = {}
    for path in find(folder, ENDINGS, options.labels):
        series.setdefault(path.parent, []).append(path)
    folders: dict[str, Path] = {}
    for place in sorted(series, key=natural):
        key = "_".join(place.relative_to(folder).parts) or place.resolve().name
        folders[key] = place
    labels = _labels(folder, options, folders)
    keys = list(folders) if list_file is None else listed(list_file, set(folders), folder)
    return [Series(key, tuple(series[folders[key]]), labels.get(key), options) for key in keys]


def _labels(folder: Path, options: Options, folders: dict[str, Path]) -> dict[str, Path]:
    if options.labels is None:
        return {}
    endings = (*volumes.NIFTI, *volumes.NRRD)
    labels = by_key(find(options.labels, endings), options.label_suffix, endings)
    alone = next((path for key, path in labels.items() if key not in folders), None)
    if alone or not labels:
        raise InputError(f"{alone or options.labels}: fits no case of {folder}: labels are named "
                         f"{next(iter(folders))}{options.label_suffix}.nii.gz")  # fmt: skip
    return labels


def _slice(path: Path) -> Any:
    """A file's header, its pixels still to be decoded. Raises InputError where what a slice needs is missing."""
    import pydicom
    from pydicom.errors import BytesLengthException, InvalidDicomError

    try:
        one = pydicom.dcmread(path, specific_tags=[*_NEEDED, *_USED])
        for _ in one:  # pydicom decodes an element, and stumbles over it, when it is looked at
            pass
        absent = [name for name in _NEEDED if not one.get(name)]
        several = int(one.get("NumberOfFrames") or 1) > 1 or int(one.get("SamplesPerPixel") or 1) != 1
    except (BytesLengthException, InvalidDicomError, *UNREADABLE) as error:
        raise InputError(f"{path}: not a readable DICOM file ({_line(error)}): {volumes.DAMAGED}") from None
    if absent or "PixelData" not in one:
        raise InputError(f"{path}: has no {(absent or ['PixelData'])[0]}: keep only the slices of one series here")
    if several:
        raise InputError(f"{path}: holds several frames or colours: convert it to NIfTI, or to a file a slice")
    _check_numbers(one, path)
    return one


def _check_numbers(one: Any, path: Path) -> None:
    """Raises InputError where the header's numbers are none, or not as many as they should be."""
    counts = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    single = ("RescaleSlope", "RescaleIntercept", "SliceThickness")
    for name in (*counts, *(name for name in single if one.get(name) is not None)):
        try:
            values = np.array(one[name].value, float).reshape(-1)
        except UNREADABLE:
            values = np.empty(0)
        if len(values) != counts.get(name, 1) or not np.isfinite(values).all():
            raise InputError(f"{path}: its {name} is not what it should be: repair the header or leave the case out")


def _check_alike(slices: Sequence[Any], paths: Sequence[Path]) -> None:
    """Raises InputError where slices are of several series, sizes, spacings or directions."""
    for name in ("SeriesInstanceUID", "Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        values = [_rounded(one[name].value) for one in slices]
        (usual, count), *others = Counter(values).most_common()
        if others:
            odd = paths[next(i for i, value in enumerate(values) if value != usual)]
            raise InputError(f"{odd}: its {name} is not that of {count} other slices here: keep one series a folder")


def _rounded(value: Any) -> Any:
    return value if isinstance(value, str | int) else tuple(np.round(np.array(value, float), 4).tolist())


def _normal(one: Any) -> np.ndarray:
    across, down = np.array(one.ImageOrientationPatient, float).reshape(2, 3)
    return np.cross(across, down)


def _place(one: Any) -> float:
    """mm along the slices' normal."""
    return float(_normal(one) @ np.array(one.ImagePositionPatient, float))


def _step(places: Sequence[float], paths: Sequence[Path], first: Any) -> float:
    """mm between slices. Raises InputError where one is missing or comes twice."""
    if len(places) == 1:
        return float(first.get("SliceThickness") or 1.0)
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    for gap, before, after in zip(gaps.tolist(), paths, paths[1:], strict=False):
        if gap <= UNEVEN * usual or usual <= 0:
            raise InputError(f"{after}: lies where {before.name} does: keep one of them, or one series a folder")
        if abs(gap - usual) > UNEVEN * usual:
            raise InputError(f"{after}: lies {gap:.3g} mm after {before.name}, slices are {usual:.3g} mm apart: one is "
                             "missing, add it or leave the case out")  # fmt: skip
    return float(places[-1] - places[0]) / (len(places) - 1)


def _values(one: Any, path: Path) -> np.ndarray:
    """(X, Y), slope and intercept applied; whole numbers stay whole."""
    try:
        pixels = one.pixel_array
    except (RuntimeError, ImportError) as error:
        said = str(error).partition("\n")[0][:160]
        raise InputError(f"{path}: its pixels cannot be decoded ({said}): install pylibjpeg and pylibjpeg-libjpeg, "
                         "or decompress the files") from None  # fmt: skip
    except UNREADABLE as error:
        raise InputError(f"{path}: its pixels cannot be read ({_line(error)}): {volumes.DAMAGED}") from None
    slope, intercept = float(one.get("RescaleSlope") or 1), float(one.get("RescaleIntercept") or 0)
    if slope.is_integer() and intercept.is_integer():
        return (pixels.astype(np.int32) * int(slope) + int(intercept)).T
    return (pixels * slope + intercept).T


def _affine(first: Any, step: float) -> np.ndarray:
    across, down = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    rows, columns = (float(size) for size in first.PixelSpacing)  # mm between rows, between columns
    affine = np.eye(4)
    affine[:3, :3] = np.stack([across * columns, down * rows, _normal(first) * step], axis=1)
    affine[:3, 3] = [float(value) for value in first.ImagePositionPatient]
    return _LPS @ affine


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
