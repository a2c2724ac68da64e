"""Data of the user: arrays for training; tables, arrays, pictures and masks for a trained model."""

import csv
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
from zipfile import BadZipFile

import numpy as np

from vlae_jax.data.dataset import Dataset
from vlae_jax.data.pictures import PICTURES, Size, find_pictures, read_picture, read_pictures
from vlae_jax.data.sets import dataset_from_arrays, load_dataset
from vlae_jax.data.tables import TABLE_FILES, Table, as_table, numbers_of, read_table
from vlae_jax.errors import UserError

_HALF_WHITE = 128
# Errors that numpy has been seen to raise for a damaged or foreign file.
_DAMAGED = (OSError, ValueError, EOFError, TypeError, KeyError, BadZipFile, zlib.error)

_KEYS = {"x_train", "x_test", "missing_train", "missing_test"}

Shape = tuple[int, ...]


class DataOptions(Protocol):
    """The fields of a configuration's data section that `as_dataset` reads."""

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        ...

    @property
    def data_dir(self) -> str | None:
        """The folder or file that holds it; None for the cache."""
        ...

    @property
    def levels(self) -> int | None:
        """How many values a pixel may take; None if that is not told."""
        ...

    @property
    def validation_fraction(self) -> float:
        """Share of the training images set aside for validation."""
        ...

    @property
    def resize(self) -> tuple[int, int] | None:
        """Height and width to bring pictures to; None for those of the files."""
        ...

    @property
    def stream(self) -> bool:
        """Whether to leave the training images on disk."""
        ...


class Images(NamedTuple):
    """Images in the form of a model's data set."""

    pixels: np.ndarray
    """uint8, (n, height, width, channel)."""
    names: tuple[str, ...] | None = None
    """File names, where each image is a file of its own."""

    def first(self, count: int | None) -> "Images":
        """The first `count` images, or all where it is None.

        Raises:
            UserError: If there are fewer, or none are asked for.
        """
        if count is None:
            return self
        if not 1 <= count <= len(self.pixels):
            raise UserError(f"images must be from 1 to {len(self.pixels)}, got {count}")
        return Images(self.pixels[:count], self.names and self.names[:count])


def as_dataset(data: Any, config: DataOptions) -> Dataset:
    """Make a data set of any of the forms in which a user may give training examples.

    Args:
        data: A data set, which is returned; a name, or None for that of the configuration;
            training examples, an array or a data frame; or a mapping with those as x_train, and
            optionally x_test (the validation examples stand in for missing test examples),
            missing_train and missing_test (masks of their missing entries) and levels.
        config: The data section of the configuration.

    Raises:
        UserError: If there is no such data set, or the images are not as described.
    """
    if isinstance(data, Dataset):
        return data
    if data is None or isinstance(data, str):
        return load_dataset(
            data or config.dataset,
            config.data_dir,
            levels=config.levels,
            validation_fraction=config.validation_fraction,
            stream=config.stream,
            resize=config.resize,
        )
    if config.resize is not None:
        raise UserError("resize is for folders of pictures, and the data are arrays")
    # A data frame may have the methods of a mapping; its columns are not parts of a data set.
    is_parts = isinstance(data, Mapping) and not hasattr(data, "to_numpy")
    arrays = dict(data) if is_parts else {"x_train": data}
    levels = arrays.pop("levels", config.levels)
    if set(arrays) - _KEYS or "x_train" not in arrays:
        held = ", ".join(map(repr, arrays)) or "nothing"
        raise UserError(
            "data must hold 'x_train', and may hold 'x_test', 'levels', 'missing_train' and "
            f"'missing_test'; it holds {held}"
        )
    train = as_table(arrays["x_train"], "x_train")
    test = None if "x_test" not in arrays else as_table(arrays["x_test"], "x_test")
    if test and test.columns != train.columns:
        raise UserError(
            f"x_test must have the columns of x_train, {_listed(train.columns)}, got "
            f"{_listed(test.columns)}"
        )
    return dataset_from_arrays(
        train.values,
        test and test.values,
        levels=None if levels is None else int(levels),
        validation_fraction=config.validation_fraction,
        columns=train.columns,
        missing=(arrays.get("missing_train"), arrays.get("missing_test")),
    )


def _listed(columns: tuple[str, ...] | None) -> str:
    return ", ".join(columns) if columns else "without names"


def read_rows(path: Path, shape: Shape, columns: tuple[str, ...] | None) -> np.ndarray:
    """Read rows of a table, or images of measurements, for a trained model.

    Args:
        path: A .csv or .parquet file, whose columns are found by name if the model's have names;
            or an .npz (key x or x_test, or the only array) or .npy file.
        shape: Of one example.
        columns: Names of the model's columns, or None.

    Returns:
        Floats (n, *shape), NaN where an entry is missing.

    Raises:
        UserError: If there are no such numbers; the message names file and column.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a .csv, .parquet, .npz or .npy file")
    is_table = path.suffix.lower() in TABLE_FILES
    return fitting(read_table(path) if is_table else Table(read_array(path)), shape, columns, path)


def fitting(
    given: Table, shape: Shape, columns: tuple[str, ...] | None, where: object
) -> np.ndarray:
    """Numbers in the form of a model's examples: floats (n, *shape), columns put in order by name.

    Raises:
        UserError: If they do not fit; the message says which column is missing.
    """
    values, names = given
    if columns and names:
        if lacking := [name for name in columns if name not in names]:
            raise UserError(
                f"{where} has no column {lacking[0]!r}, which the model was trained on; it has "
                f"{', '.join(names)}"
            )
        values, names = values[:, [names.index(name) for name in columns]], columns
    values = values[None] if values.shape == shape else values
    found = numbers_of("input", Table(values, names), where)
    if found.shape[1:] != shape:
        raise UserError(
            f"{where}: examples must have shape {_by(shape)}, as those of the run, got "
            f"{_by(found.shape[1:])}"
        )
    return found


def read_images(path: Path, shape: Shape, levels: int, *, resize: Size | None = None) -> Images:
    """Read images of one shape.

    An array is the key x or x_test of an .npz file, the only array in it, or an .npy file: uint8,
    (n, height, width, channel), without the channel where there is one, or a single image. Picture
    files are 8 bits a channel; colors become gray where the model has one channel.

    Args:
        path: An .npz or .npy file, a picture, or a folder of pictures and of folders of them, taken
            in order of their paths.
        shape: (height, width, channel) that the images must have.
        levels: Pixels must lie below.
        resize: Bring pictures to this size, as those of the training were; nothing else is resized.

    Raises:
        UserError: If there are no such images there; the message names the file.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give an .npz, .npy or picture file, or a folder")
    if path.is_dir() or path.suffix.lower() in PICTURES:
        files = find_pictures(path) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} holds no pictures: none of {', '.join(sorted(PICTURES))}")
        pictures = read_pictures(files, shape[2], resize)
        root = path if path.is_dir() else path.parent
        names = tuple(file.relative_to(root).as_posix() for file in files)
        return Images(checked(pictures, shape, levels, path), names)
    return Images(checked(_as_images(read_array(path), shape, path), shape, levels, path))


def write_rows(file: IO[bytes], rows: np.ndarray, columns: Sequence[str] | None) -> None:
    """Write rows of a table as CSV, with a line of names where the columns have any."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if columns:
        writer.writerow(columns)
    writer.writerows([f"{value:.7g}" for value in row] for row in rows)
    file.write(text.getvalue().encode())


def read_mask(path: Path, shape: Shape) -> np.ndarray:
    """Read which entries of a table are missing: those that are not 0, booleans (n, dim).

    Raises:
        UserError: If there is no such mask there.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give an .npz or .npy file of the mask")
    mask = read_array(path, ("missing",))
    if mask.dtype.kind not in "biu" or mask.shape not in (shape, shape[1:]):
        raise UserError(
            f"{path}: a mask for {shape[0]} rows must hold booleans or integers, {_by(shape[1:])} "
            f"or {_by(shape)}, got {mask.dtype} {_by(mask.shape)}"
        )
    return np.broadcast_to(mask != 0, shape)


def read_missing(path: Path, shape: Shape, count: int) -> np.ndarray:
    """Read which pixels are missing: those that are not 0, or in a picture those nearer to white.

    Args:
        path: An .npz (key missing, or the only one) or .npy file, or a black and white picture:
            one mask for all images or one each, with or without channels.
        shape: (height, width, channel) of the images.
        count: How many images there are.

    Returns:
        Booleans, (count, height, width, channel).

    Raises:
        UserError: If there is no such mask there, or nothing is missing.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give an .npz, .npy or picture file of the mask")
    is_picture = path.suffix.lower() in PICTURES
    mask = read_picture(path, 1)[..., 0] if is_picture else read_array(path, ("missing",))
    values = f"{mask.min()} to {mask.max()}" if mask.size else "none"
    if is_picture:  # compression and soft edges leave other values than black and white
        mask = mask >= _HALF_WHITE
    if mask.dtype.kind not in "biu":
        raise UserError(f"{path}: a mask holds booleans or integers, got {mask.dtype}")
    given = mask.shape
    if mask.shape in (shape[:2], (count, *shape[:2])):
        mask = mask[..., None]
    if mask.ndim == 3:
        mask = mask[None]
    wanted = (count, *shape)
    if mask.ndim != 4 or any(a not in (1, b) for a, b in zip(mask.shape, wanted, strict=True)):
        raise UserError(
            f"{path}: a mask for {count} images must have shape {_by(shape[:2])} or "
            f"{_by((count, *shape[:2]))}, with channels or without, got {_by(given)}"
        )
    if mask.shape[1:3] != shape[:2]:
        raise UserError(f"{path}: a mask must have shape {_by(shape[:2])}, got {_by(given)}")
    missing = np.broadcast_to(mask != 0, wanted)
    if not missing.any():
        which = f"from {_HALF_WHITE} to 255" if is_picture else "that are not 0"
        raise UserError(
            f"{path}: nothing is missing; pixels {which} are filled in, and its values are {values}"
        )
    return missing


def read_array(path: Path, keys: tuple[str, ...] = ("x", "x_test")) -> np.ndarray:
    """The array in an .npz file, the first of these keys or the only one, or in an .npy file.

    Raises:
        UserError: If there is none.
    """
    if path.suffix.lower() not in (".npz", ".npy"):
        raise UserError(f"{path} is not an .npz, .npy or picture file, nor a folder of pictures")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            found = [key for key in keys if key in loaded.files]
            found = found or (loaded.files if len(loaded.files) == 1 else [])
            if found:
                return loaded[found[0]]
            held = ", ".join(loaded.files) or "nothing"
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    wanted = " or ".join(keys)
    raise UserError(f"{path} needs an array {wanted}, or only one array; it holds {held}")


def checked(images: np.ndarray, shape: Shape, levels: int, where: object) -> np.ndarray:
    """Return images (n, height, width, channel) that fit a model, and refuse others.

    Raises:
        UserError: If there are none, or their type, shape or range does not fit.
    """
    if images.dtype != np.uint8:
        advice = f"give pixels from 0 to {levels - 1}"
        if np.issubdtype(images.dtype, np.floating):
            advice += f": round(x * {levels - 1}) where x lies in [0, 1]"
        raise UserError(f"{where}: images must be uint8, got {images.dtype}; {advice}")
    if images.shape[1:] != shape:
        raise UserError(
            f"{where}: images must have shape {_by(shape)}, as those of the run, "
            f"got {_by(images.shape[1:])}"
        )
    if len(images) == 0:
        raise UserError(f"{where} holds no images; at least one is needed")
    if images.max() >= levels:
        raise UserError(
            f"{where}: pixels of the run's images lie from 0 to {levels - 1}, got {images.max()}"
        )
    return images


def _as_images(array: np.ndarray, shape: Shape, where: Path) -> np.ndarray:
    """Add an axis of images and one of channels where the shape shows that they are missing."""
    plain = shape[:2] if shape[2] == 1 else None
    if array.shape == shape or array.shape == plain:
        return array.reshape(1, *shape)
    if array.ndim == 3 and array.shape[1:] == plain:
        return array[..., None]
    if array.ndim != 4:
        raise UserError(
            f"{where}: images must have shape {_by(('n', *shape))}"
            f"{' or ' + _by(('n', *plain)) if plain else ''}, or be one of them, "
            f"got {_by(array.shape)}"
        )
    return array


def _by(shape: tuple[object, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
