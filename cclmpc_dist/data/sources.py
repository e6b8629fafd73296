"""Corpora on disk: by format, what lists handles of its cases in the order the corpus gives them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cclmpc_dist.data.case import Handle
from cclmpc_dist.data.formats.dicom import dicom
from cclmpc_dist.data.formats.h5 import acdc_slices, acdc_volumes, la_h5
from cclmpc_dist.data.formats.images import images
from cclmpc_dist.data.formats.options import Options
from cclmpc_dist.data.formats.volumes import nifti, nrrd
from cclmpc_dist.errors import InputError


@dataclass(frozen=True)
class Format:
    """open(folder, list, options) gives the handles; takes: the fields of Options that mean something to it."""

    open: Callable[[str | Path, str | Path | None, Options], Sequence[Handle]]
    takes: frozenset[str] = frozenset()


_LABELS = frozenset({"labels", "label_suffix", "label_map"})
_VOLUMES = _LABELS | {"normalise", "spacing", "orient"}
FORMATS = {
    "la-h5": Format(la_h5),
    "acdc-h5": Format(acdc_slices, frozenset({"normalise", "label_map"})),
    "acdc-h5-volumes": Format(acdc_volumes, frozenset({"normalise", "label_map"})),
    "nifti": Format(nifti, _VOLUMES | {"channels"}),
    "nrrd": Format(nrrd, _VOLUMES | {"channels"}),
    "dicom": Format(dicom, _VOLUMES),
    "images": Format(images, _LABELS | {"normalise", "resize", "channels"}),
}


def cases(name: str, folder: str | Path, list_file: str | Path | None, options: Options) -> Sequence[Handle]:
    """Handles of a corpus. Raises InputError, also where an option means nothing to the format."""
    known = FORMATS[name]
    plain = Options(classes=options.classes)
    for field, value in vars(options).items():
        if value != getattr(plain, field) and field not in known.takes:
            flags = ", ".join(f"--{taken.replace('_', '-')}" for taken in sorted(known.takes)) or "none of its kind"
            raise InputError(f"--{field.replace('_', '-')}: --format {name} does not take it, only {flags}")
    return known.open(folder, list_file, options)
