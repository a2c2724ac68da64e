"""Picture files: one of them as pixels, and a folder of them as a data set."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vlae_jax.data.formats import Parts, checked_parts
from vlae_jax.errors import UserError

PICTURES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Endings of the picture files that are read, by Pillow."""
Size = tuple[int, int]
"""Height and width."""

_CHANNELS = {1: "L", 3: "RGB"}
_GRAY = ("1", "L", "LA")
_READABLE = (*_GRAY, "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_TRAIN, _TEST = "train", "test"


def find_pictures(folder: Path) -> list[Path]:
    """The picture files in a folder and all folders in it, in order of their paths."""
    return sorted(_pictures(folder))


def _pictures(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in PICTURES and not is_hidden and path.is_file():
            yield path


def holds_pictures(folder: Path) -> bool:
    """Whether there is a picture file in a folder, or in a folder in it."""
    return folder.is_dir() and any(_pictures(folder))


def read_folder(folder: Path, resize: Size | None = None) -> Parts:
    """Read a folder of pictures, with or without a folder for each class, as a data set.

    Folders named train and test in it are its two parts; otherwise all pictures are one part. They
    are gray if all files are, and otherwise in color.

    Args:
        folder: The folder.
        resize: Height and width of the images; by default those of the files, which must agree.

    Returns:
        uint8 (n, height, width, channel).

    Raises:
        UserError: If a file cannot be read, or their sizes differ; the message names the files.
    """
    is_split = all(holds_pictures(folder / part) for part in (_TRAIN, _TEST))
    parts = (
        [find_pictures(folder / p) for p in (_TRAIN, _TEST)]
        if is_split
        else [find_pictures(folder)]
    )
    channels = 1 if all(_is_gray(path) for part in parts for path in part) else 3
    train, *test = (read_pictures(part, channels, resize) for part in parts)
    return checked_parts(Parts(train, test[0] if test else None), folder)


def read_pictures(paths: Sequence[Path], channels: int, resize: Size | None = None) -> np.ndarray:
    """Read picture files of one size, uint8 (n, height, width, channels).

    Raises:
        UserError: If one cannot be read, or their sizes differ.
    """
    images = [read_picture(path, channels, resize) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise UserError(
                f"{path} has {_size(image)} pixels (height x width), but {paths[0].name} has "
                f"{_size(images[0])}; --resize HEIGHT WIDTH brings the pictures of a training to "
                "one size"
            )
    return np.stack(images)


def read_picture(path: Path, channels: int, resize: Size | None = None) -> np.ndarray:
    """The pixels of a picture file, uint8 (height, width, channels), as viewers show it.

    Args:
        path: The file.
        channels: 1 for gray, 3 for color.
        resize: Height and width. The picture is scaled so that it covers them, with its own aspect
            ratio, and what protrudes is cut off evenly.

    Raises:
        UserError: If it cannot be read, or is not one opaque picture of 8 bits a channel.
    """
    Image, ImageOps = _pillow(path)
    mode = _CHANNELS.get(channels)
    if mode is None:
        raise UserError(f"{path}: pictures have 1 or 3 channels, the run's images {channels}")
    try:
        with Image.open(path) as image:
            if image.mode not in _READABLE:
                raise UserError(f"{path} has not 8 bits a channel but mode {image.mode}")
            if ";16" in str(image.tile):  # Pillow would keep the upper half of each
                raise UserError(f"{path} has not 8 bits a channel but 16")
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise UserError(f"{path} holds {frames} pictures; save each as a file of its own")
            ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                opaque = image.convert("RGBA")
                if np.asarray(opaque)[..., 3].min() < 255:
                    raise UserError(f"{path} is transparent in places; put it on a background")
                image = opaque
            image = image.convert(mode)
            if resize is not None:
                image = ImageOps.fit(image, resize[::-1], Image.Resampling.LANCZOS)
            return np.asarray(image).reshape(image.height, image.width, channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from None


def _is_gray(path: Path) -> bool:
    Image, _ = _pillow(path)
    try:
        with Image.open(path) as image:
            return image.mode in _GRAY
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from None


def _pillow(path: Path):  # type: ignore[no-untyped-def]
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError(f"reading {path} needs Pillow: pip install 'vlae-jax[train]'") from None
    return Image, ImageOps


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"
