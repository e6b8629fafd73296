"""NIfTI (nibabel) and NRRD (pynrrd) files, one a case or one a channel, -> Cases."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cclmpc_dist.data.case import Case
from cclmpc_dist.data.formats import geometry
from cclmpc_dist.data.formats.files import UNREADABLE, Files, paired
from cclmpc_dist.data.formats.geometry import Volume
from cclmpc_dist.data.formats.labels import to_classes
from cclmpc_dist.data.formats.normalise import Rule, normalise
from cclmpc_dist.data.formats.options import AXIS, Options
from cclmpc_dist.errors import InputError

NIFTI, NRRD = (".nii.gz", ".nii"), (".nrrd",)
DAMAGED = "truncated, damaged or of another format: copy it again"
_LPS, _LAS = np.diag([-1.0, -1, 1, 1]), np.diag([-1.0, 1, 1, 1])
_SPACES = {
    "left-posterior-superior": _LPS, "lps": _LPS, "left-anterior-superior": _LAS, "las": _LAS,
    "right-anterior-superior": np.eye(4), "ras": np.eye(4), None: np.eye(4),
}  # fmt: skip


class VolumeFiles(Files):
    """A case of one file a channel."""

    def read(self) -> Case:
        volumes = [read(path) for path in self.images]
        for other in volumes[1:]:
            geometry.same_place(volumes[0], other)
        array = volumes[0].array if len(volumes) == 1 else np.stack([v.array for v in volumes], axis=-1)
        first = volumes[0]
        if array.ndim == 4 and len(volumes) == 1 and self.options.channels != (AXIS,):
            raise InputError(f"{first.path}: has shape {array.shape}, expected three axes: take --channels axis if the "
                             "last are channels, or save each volume in a file of its own")  # fmt: skip
        if array.ndim not in (3, 4):
            raise InputError(f"{first.path}: has shape {array.shape}: expected three axes (X, Y, Z)")
        return case(self, Volume(array, first.affine, first.path))


def nifti(folder: str | Path, list_file: str | Path | None, options: Options) -> list[Files]:
    """Cases of a folder of .nii and .nii.gz files, by name. Raises InputError."""
    return _found(folder, list_file, options, NIFTI)


def nrrd(folder: str | Path, list_file: str | Path | None, options: Options) -> list[Files]:
    """Cases of a folder of .nrrd files, by name. Raises InputError."""
    return _found(folder, list_file, options, NRRD)


def _found(folder: str | Path, list_file: str | Path | None, options: Options, endings: Sequence[str]) -> list[Files]:
    named = Options(**vars(options) | {"channels": ()}) if options.channels == (AXIS,) else options
    cases = paired(Path(folder), list_file, named, endings, (*NIFTI, *NRRD))
    return [VolumeFiles(*case, options) for case in cases]


def case(files: Files, image: Volume, extra: Mapping[str, object] | None = None) -> Case:
    """A Case of an image (X, Y, Z) or (X, Y, Z, C): turned, with its label, resampled, normalised.

    extra: more for the sample's JSON. Raises InputError naming the file.
    """
    if not np.isfinite(image.array).all():
        raise InputError(f"{image.path}: holds NaN or infinity: repair it or leave it out")
    label = read(files.label) if files.label else None
    if files.options.orient == geometry.AXES:
        image = geometry.oriented(image)
        label = geometry.oriented(label) if label else None
    if label:
        geometry.same_place(image, label)
    classes = _classes(label, files.options)
    if files.options.spacing:
        image = geometry.resampled(image, files.options.spacing, 1)
        classes = classes and geometry.resampled(classes, files.options.spacing, 0)
    array = image.array[None] if image.array.ndim == 3 else np.moveaxis(image.array, -1, 0)
    values = normalise(array, files.options.normalise or Rule("zscore"), image.path)
    meta = {"affine": image.affine.tolist(), "axes": geometry.axes(image), "normalisation": values.said}
    mask = classes.array if classes else None
    return Case(files.key, values.image, mask, image.spacing, {**meta, **(extra or {})}, values.seen)


def _classes(label: Volume | None, options: Options) -> Volume | None:
    if label is None:
        return None
    if label.array.ndim != 3:
        raise InputError(f"{label.path}: a label of shape {label.array.shape}: expected three axes, class numbers")
    return Volume(to_classes(label.array, options.label_map, options.classes, label.path), label.affine, label.path)


def read(path: Path) -> Volume:
    """A file's array (X, Y, Z) or with channels last, and its affine, checked. Raises InputError naming the file."""
    volume = _nifti(path) if path.name.lower().endswith(NIFTI) else _nrrd(path)
    if volume.array.dtype.kind not in "biuf":
        raise InputError(f"{path}: voxels of type {volume.array.dtype}: save real numbers, one a voxel")
    return volume.checked()


def _nifti(path: Path) -> Volume:
    """nibabel's reading, with what it mends in silence refused. ITK, for one, fills what a file lacks with zeros."""
    import nibabel
    from nibabel import imageglobals
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        with imageglobals.LoggingOutputSuppressor(), imageglobals.ErrorLevel(30):
            image: Any = nibabel.load(path)
        array = np.asanyarray(image.dataobj)
    except HeaderDataError as error:
        raise InputError(f"{path}: its header says what cannot be ({_line(error)}): repair the header") from None
    except (ImageFileError, *UNREADABLE) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({_line(error)}): {DAMAGED}") from None
    if not np.isfinite(image.header["pixdim"][1:4]).all():
        raise InputError(f"{path}: its spacing is not finite: repair the header")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Volume(array, np.asarray(image.affine, float), path)


def _nrrd(path: Path) -> Volume:
    import nrrd

    try:
        with open(path, "rb") as file:
            header = nrrd.read_header(file)
            if "data file" in header or "datafile" in header:
                raise InputError(f"{path}: its voxels are in another file: save header and voxels as one .nrrd")
            array = nrrd.read_data(header, file, str(path))
    except (nrrd.NRRDError, StopIteration, *UNREADABLE) as error:
        raise InputError(f"{path}: not a readable NRRD file ({_line(error)}): {DAMAGED}") from None
    directions = header.get("space directions")
    spatial = [] if directions is None else [axis for axis, row in enumerate(directions) if np.isfinite(row).any()]
    if array.ndim == 4 and len(spatial) == 3:
        array = np.moveaxis(array, ({0, 1, 2, 3} - set(spatial)).pop(), -1)
    space = str(header["space"]).lower() if "space" in header else None
    if space not in _SPACES:
        raise InputError(f"{path}: its space is {space}: save it as left-posterior-superior")
    affine = np.eye(4)
    if directions is not None and len(spatial) == 3:
        affine[:3, :3] = np.array([directions[axis] for axis in spatial], float).T
    elif directions is None:
        spacings = np.array(header.get("spacings", np.ones(array.ndim)), float)
        affine[:3, :3] = np.diag(spacings[:3]) if len(spacings) >= 3 else np.eye(3)
    affine[:3, 3] = header.get("space origin", np.zeros(3))
    return Volume(array, _SPACES[space] @ affine, path)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
