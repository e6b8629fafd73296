"""Folders of PNG, JPEG and TIFF images, with masks or without (Pillow), -> 2D Cases. Layout: (C, H, W)."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cclmpc_dist.data.case import Case
from cclmpc_dist.data.formats.files import UNREADABLE, Files, paired
from cclmpc_dist.data.formats.labels import to_classes
from cclmpc_dist.data.formats.normalise import Rule, normalise
from cclmpc_dist.data.formats.options import COLOURS, Options
from cclmpc_dist.errors import InputError

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright


class ImageFile(Files):
    """A case of one image file."""

    def read(self) -> Case:
        path, options = self.images[0], self.options
        image = _image(path, options.channels)
        label = None
        if self.label is not None:
            mask = _mask(self.label)
            if mask.shape != image.shape[1:]:
                sizes = f"{mask.shape} and {path} {image.shape[1:]} (height, width)"
                raise InputError(f"{self.label}: has shape {sizes}: they must be the same")
            label = to_classes(mask, options.label_map, options.classes, self.label)
        if options.resize:
            image = np.stack([_resized(channel, options.resize, smooth=True) for channel in image])
            label = label if label is None else _resized(label, options.resize, smooth=False)
        values = normalise(image, options.normalise or Rule("zscore"), path, together=True)
        meta = {"normalisation": values.said, "unit": "pixel"}
        return Case(self.key, values.image, label, (1.0, 1.0), meta, values.seen)


def images(folder: str | Path, list_file: str | Path | None, options: Options) -> list[Files]:
    """Cases of a folder of images, by name. Raises InputError."""
    if options.channels and (len(options.channels) > 1 or options.channels[0] not in COLOURS):
        raise InputError(f"--channels {','.join(options.channels)}: images take {' or '.join(COLOURS)}")
    named = Options(**vars(options) | {"channels": ()})
    return [ImageFile(*case, options) for case in paired(Path(folder), list_file, named, ENDINGS, ENDINGS)]


def _open(path: Path) -> Any:
    """The decoded image. Raises InputError where it cannot be read, or Pillow would read less than it holds."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            pages = getattr(image, "n_frames", 1)
            if pages > 1:
                raise InputError(f"{path}: holds {pages} pages: save each as a file of its own")
            if image.mode in ("RGB", "RGBA") and any(";16" in str(tile.args) for tile in image.tile):
                raise InputError(f"{path}: 16 bits a colour, of which 8 would be lost: save 8 bits, or a file a colour")
            if image.getexif().get(_ORIENTATION, 1) != 1:
                raise InputError(f"{path}: is turned by its EXIF orientation: save it upright")
            image.load()
            return image.copy()
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        said = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a readable image ({said}): truncated, damaged or of another format: "
                         "copy it again") from None  # fmt: skip


def _image(path: Path, colours: tuple[str, ...]) -> np.ndarray:
    """(1 or 3, H, W), whole numbers where the file has them."""
    image = _open(path)
    if colours:
        image = image.convert("L" if colours == ("grey",) else "RGB")
    if image.mode == "RGB":
        return np.moveaxis(np.asarray(image), -1, 0)
    array = np.asarray(image)
    if image.mode in ("P", "PA", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "HSV") or array.ndim != 2:
        raise InputError(f"{path}: its colours are of mode {image.mode}: take --channels rgb or --channels grey")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{path}: holds NaN or infinity: repair it or leave it out")
    return (array.astype(np.uint8) if array.dtype == bool else array)[None]


def _mask(path: Path) -> np.ndarray:
    """(H, W) values; of a palette its numbers, of equal colours one."""
    image = _open(path)
    array = np.asarray(image)
    if array.ndim == 3 and image.mode == "RGB" and (array == array[..., :1]).all():
        array = array[..., 0]
    if array.ndim != 2:
        raise InputError(f"{path}: a mask in colours ({image.mode}): save one number a pixel, grey or palette")
    return array


def _resized(array: np.ndarray, size: tuple[int, ...], smooth: bool) -> np.ndarray:
    """(H, W) -> `size`: linear with smoothing, whole numbers staying whole, or the nearest pixel's."""
    from PIL import Image

    method = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    wide = array.astype(np.float32) if smooth else array
    done = np.asarray(Image.fromarray(wide).resize((size[1], size[0]), method))
    return (np.round(done) if array.dtype.kind in "iu" else done).astype(array.dtype)
