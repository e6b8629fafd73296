"""HDF5 files of the semi-supervised literature -> Cases: LA as UA-MT's authors publish it, ACDC as SSL4MIS's do.

Both hold `image` and, where there is a label, `label` of the same shape.
"""

import re
from pathlib import Path

import numpy as np

from cclmpc_dist.data.case import Case
from cclmpc_dist.data.formats.files import Files, find, lines, listed, stem
from cclmpc_dist.data.formats.labels import to_classes
from cclmpc_dist.data.formats.normalise import Rule, normalise
from cclmpc_dist.data.formats.options import Options
from cclmpc_dist.errors import InputError

LA_FILE = "mri_norm2.h5"
LA_SPACING = (0.625, 0.625, 0.625)  # mm, the challenge's resampled scans (Xiong et al., 2020)
SLICES = ("data/slices", "ACDC_training_slices", "all_slices")  # where releases of SSL4MIS keep them
VOLUMES = ("data", "ACDC_training_volumes", "all_volumes")


class LaFile(Files):
    """The handle of `<folder>/<key>/mri_norm2.h5`."""

    def read(self) -> Case:
        image, label = _read_h5(self.images[0], 3)
        meta = {
            "patient": self.key,
            "cropped_by_label": True,
            "normalisation": "zero mean, unit variance before the crop",
        }
        return Case(self.key, image[None], label, LA_SPACING, meta)


def la_h5(folder: str | Path, list_file: str | Path | None = None, options: Options | None = None) -> list[LaFile]:
    """Cases of `<folder>/<case>/mri_norm2.h5`, the LA corpus as UA-MT's authors publish it.

    `list_file` names the cases, one a line, and their order; without it every subfolder is a case, sorted by
    name. Raises InputError naming the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: name the one that holds <case>/{LA_FILE}")
    known = sorted(path.parent.name for path in folder.glob(f"*/{LA_FILE}"))
    if not known and not list_file:
        raise InputError(f"{folder}: no cases: expected <case>/{LA_FILE}")
    keys = listed(list_file, set(known), folder) if list_file else known
    return [LaFile(key, (folder / key / LA_FILE,), None, options or Options()) for key in keys]


class AcdcFile(Files):
    """The handle of a slice (H, W), or of a volume (Z, H, W) that becomes (H, W, Z)."""

    def read(self) -> Case:
        path = self.images[0]
        flat = "_slice_" in self.key
        image, label = _read_h5(path, 2 if flat else 3)
        if label is not None:
            label = to_classes(label, self.options.label_map, self.options.classes, path)
        if not flat:
            image, label = np.moveaxis(image, 0, -1), None if label is None else np.moveaxis(label, 0, -1)
        if not np.isfinite(image).all():
            raise InputError(f"{path}: holds NaN or infinity: repair it or leave it out")
        values = normalise(image[None], self.options.normalise or Rule("none"), path)
        meta = {"patient": self.key.partition("_")[0], "normalisation": values.said, "unit": "voxel"}
        return Case(self.key, values.image, label, (1.0,) * image.ndim, meta, values.seen)


def acdc_slices(folder: str | Path, list_file: str | Path | None, options: Options) -> list[AcdcFile]:
    """2D cases of SSL4MIS's ACDC: `<folder>/data/slices/patient001_frame01_slice_1.h5`, or in ACDC_training_slices,
    all_slices or the folder itself.

    A line of `list_file` names a slice, a frame or a patient, and stands for all its slices, in their order; the
    files tell no spacing. Raises InputError.
    """
    return _acdc(Path(folder), list_file, options, SLICES, "_slice_")


def acdc_volumes(folder: str | Path, list_file: str | Path | None, options: Options) -> list[AcdcFile]:
    """3D cases of the same: `<folder>/data/patient001_frame01.h5`, or in ACDC_training_volumes, all_volumes or the
    folder itself. Lines of `list_file` name volumes or patients. Raises InputError."""
    return _acdc(Path(folder), list_file, options, VOLUMES, "")


def _acdc(
    folder: Path, list_file: str | Path | None, options: Options, places: tuple[str, ...], mark: str
) -> list[AcdcFile]:
    place = next((folder / name for name in places if (folder / name).is_dir()), folder)
    files = {stem(path, (".h5",)): path for path in find(place, (".h5",)) if path.parent == place}
    files = {key: path for key, path in files.items() if bool(mark) == ("_slice_" in key)}
    if not files:
        raise InputError(f"{place}: no cases: expected patient001_frame01{mark and mark + '1'}.h5")
    keys = list(files) if list_file is None else _expanded(list_file, list(files), place)
    return [AcdcFile(key, (files[key],), None, options) for key in keys]


def _expanded(list_file: str | Path, known: list[str], place: Path) -> list[str]:
    """The keys that each line of a list stands for. Raises InputError where a line fits none."""
    keys = []
    for line in lines(list_file):
        name = re.sub(r"\.h5$", "", line)
        fitting = [key for key in known if key == name or key.startswith(f"{name}_")]
        if not fitting:
            raise InputError(f"{list_file}: case {line} is not in {place}: take it off the list or add its file")
        keys += fitting
    return keys


def _read_h5(path: Path, axes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """`image` of so many axes, and `label` or None. Raises InputError naming the file."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "image" not in file:
                raise InputError(
                    f"{path}: holds no `image`, only {', '.join(file) or 'nothing'}: is it the right --format?"
                )
            image, label = file["image"][:], file["label"][:] if "label" in file else None
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({' '.join(str(error).split())}): fetch it again") from None
    if image.ndim != axes:
        named = "two axes (H, W)" if axes == 2 else "three axes (X, Y, Z)"
        raise InputError(f"{path}: `image` has shape {image.shape}: expected {named}")
    if label is not None and label.dtype.kind == "f" and (label != np.round(label)).any():
        raise InputError(f"{path}: `label` holds other values than whole numbers: save class numbers")
    if label is not None and label.shape != image.shape:
        raise InputError(f"{path}: `label` has shape {label.shape} and `image` {image.shape}: they must be the same")
    return image, label
