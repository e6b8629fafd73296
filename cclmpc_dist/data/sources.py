"""Corpora on disk: each source lists handles of its cases, in the order the corpus gives them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cclmpc_dist.data.case import Case
from cclmpc_dist.errors import InputError

LA_FILE = "mri_norm2.h5"
LA_SPACING = (0.625, 0.625, 0.625)  # mm, the challenge's resampled scans (Xiong et al., 2020)


@dataclass(frozen=True)
class LaFile:
    """The handle of `<folder>/<key>/mri_norm2.h5`; its fingerprint is the file's size."""

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / self.key / LA_FILE

    @property
    def fingerprint(self) -> str:
        return str(self.path.stat().st_size)

    def read(self) -> Case:
        return _la_case(self.path, self.key)


def la_h5(folder: str | Path, list_file: str | Path | None = None) -> list[LaFile]:
    """Cases of `<folder>/<case>/mri_norm2.h5`, the LA corpus as UA-MT's authors publish it.

    `list_file` names the cases, one a line, and their order; without it every subfolder is a case, sorted by
    name. The files hold `image` (X, Y, Z) and, where there is a label, `label` of the same shape. Raises
    InputError naming the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: name the one that holds <case>/{LA_FILE}")
    keys = _listed(Path(list_file)) if list_file else sorted(path.parent.name for path in folder.glob(f"*/{LA_FILE}"))
    if not keys:
        raise InputError(
            f"{list_file or folder}: no cases: expected {'one name a line' if list_file else f'<case>/{LA_FILE}'}"
        )
    absent = [key for key in keys if not (folder / key / LA_FILE).is_file()]
    if absent:
        others = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise InputError(
            f"{list_file}: case {absent[0]}{others} is not in {folder}: take it off the list or fetch its file"
        )
    return [LaFile(folder, key) for key in keys]


def _listed(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"{path}: cannot read the list of cases ({error.strerror})") from None


def _la_case(path: Path, key: str) -> Case:
    image, label = _read_h5(path)
    if image.ndim != 3:
        raise InputError(f"{path}: `image` has shape {image.shape}: expected three axes (X, Y, Z)")
    if label is not None and label.dtype.kind == "f" and (label != np.round(label)).any():
        raise InputError(f"{path}: `label` holds other values than whole numbers: save class numbers")
    if label is not None and label.shape != image.shape:
        raise InputError(f"{path}: `label` has shape {label.shape} and `image` {image.shape}: they must be the same")
    meta = {
        "patient": key,
        "cropped_by_label": True,
        "normalisation": "zero mean, unit variance before the crop",
    }
    return Case(key, image[None], label, LA_SPACING, meta)


def _read_h5(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "image" not in file:
                raise InputError(f"{path}: holds no `image`, only {', '.join(file) or 'nothing'}: is it an LA file?")
            return file["image"][:], file["label"][:] if "label" in file else None
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({' '.join(str(error).split())}): fetch it again") from None
