"""Data sets in three parts, loaded by name or made from arrays, and prepared by a download.

Named image sets come from the cache, a given folder or a download, and one is never replaced by
another. Only `prepare_dataset` needs TensorFlow, and only while tensorflow-datasets prepares a
download; it leaves a plain .npz file, or a directory of array_record files to stream from.
"""

import enum
import hashlib
import math
import os
import shutil
from pathlib import Path

import numpy as np

from vlae_jax.data.dataset import Dataset, without
from vlae_jax.data.formats import (
    Parts,
    checked_parts,
    file_source,
    installed,
    is_image,
    one_line_error,
    require_one_shape,
    write_npz,
)
from vlae_jax.data.pictures import Size
from vlae_jax.data.prepared import (
    KNOWN_DATASETS,
    TFDS_NAMES,
    PreparedPart,
    cache_dir,
    cannot_download,
    download,
    open_builder,
    read_builder,
)
from vlae_jax.data.search import (
    cached_file,
    find_source,
    find_streamable,
    lacking_to_stream,
    nothing_fits,
    nothing_to_stream,
    path_of,
    refuse_file_for_digits,
    refuse_to_stream_digits,
)
from vlae_jax.data.stored import BATCH, StoredImages, add_value_counts
from vlae_jax.errors import UserError, nearest

# The same split in every run, whatever its seed, so that runs can be compared.
_SPLIT_SEED = 0
ARRAYS = "arrays"
"""Name of a data set that was given as arrays."""


class Availability(enum.IntEnum):
    """How available a data set is. The numbers are exit codes of `prepare --check`."""

    READABLE = 0
    NEEDS_TFDS = 3
    NEEDS_DOWNLOAD = 4


_UNLIKELY_BELOW = 64


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    levels: int | None = None,
    validation_fraction: float = 0.1,
    stream: bool = False,
    resize: Size | None = None,
) -> Dataset:
    """Load images or a table by name.

    digits comes with scikit-learn; it has no official split and is split at random, one fifth to
    test. Any other name is looked for in `data_dir` alone if that is given: in a single .npz file,
    or in a folder as NAME.npz, as idx files (mnist, fashion_mnist and your own names) or as a
    directory that tensorflow-datasets prepared in the array_record format, or as pictures: in a
    folder NAME, or for a name of your own the folder itself, with or without folders of classes in
    it. Without `data_dir` it is read from the cache, and downloaded into it when missing. An .npz
    file holds x_train and x_test, uint8, (n, height, width) or (n, height, width, channel).

    Measurements come in the same way, in .npz files as floats or as tables (n, dim) of any numbers
    (with `columns`, their names, if wanted), and in .npy, .csv and .parquet files; the last two are
    read by pyarrow, of the extra `tables`. A table that is not split already is split at random,
    one fifth to test.

    With `stream` the training images stay on disk. It takes a directory that tensorflow-datasets
    prepared in the array_record format, in `data_dir` or the cache. All of it is read once, for the
    fingerprint and the statistics; the images, their order and the fingerprint are the same as
    without. Validation and test images are held in memory.

    Args:
        name: One of `KNOWN_DATASETS`, or a name of your own for what `data_dir` holds.
        data_dir: Where to look, or None for the cache and then a download.
        levels: How many values a pixel may take, from 0. By default 256, and 17 for digits; images
            that use only the lowest of them are refused until it is told.
        validation_fraction: Share of the training images set aside for validation, between 0 and 1.
        stream: Leave the training images on disk.
        resize: Height and width to bring pictures to; by default theirs, which must agree.

    Raises:
        UserError: If the name is not known, nothing fits in `data_dir`, the images are not as
            described above, a part is empty, or a download is needed and cannot be done.
    """
    if resize is not None and (stream or name == "digits"):
        raise UserError("--resize is for folders of pictures: leave it out")
    if stream:
        return _stream(name, data_dir, validation_fraction)
    if name == "digits":
        refuse_file_for_digits(data_dir)
        described = "scikit-learn load_digits, split at random"
        parts = _digits()
        levels = _checked_levels(parts, levels or 17, described, "--levels")
        return _split(name, parts, levels, described, validation_fraction)
    source = find_source(name, data_dir, resize)
    if source is None and data_dir is not None:
        raise UserError(nothing_fits(name, path_of(data_dir)))
    if source is None:
        source = file_source(prepare_dataset(name))
        assert source is not None
    if resize is not None and not source.is_pictures:
        raise UserError(f"--resize is for folders of pictures, and {source.description} is none")
    parts, where = source.read(), source.description
    if parts.test is None:
        parts, where = _with_test(parts, where), f"{where}, split at random"
    levels = _checked_levels(parts, levels, source.description, "--levels")
    return _split(name, parts, levels, where, validation_fraction)


def dataset_from_arrays(
    train: np.ndarray,
    test: np.ndarray | None = None,
    *,
    levels: int | None = None,
    validation_fraction: float = 0.1,
    columns: tuple[str, ...] | None = None,
    missing: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> Dataset:
    """A data set of arrays in memory, which has no name of its own: `ARRAYS`.

    Args:
        train: Images of pixels, uint8, (n, height, width) or (n, height, width, channel); a table
            of numbers (n, dim); or images of measurements, floats. NaN marks a missing entry.
        test: Examples of the same kind and shape. Without them the validation examples stand in for
            test examples.
        levels: How many values a pixel may take, from 0; by default 256.
        validation_fraction: Share of the training examples set aside for validation, between 0 and
            1.
        columns: Names of a table's columns.
        missing: Masks of the missing entries of `train` and `test`, booleans of their shapes.

    Raises:
        UserError: If the arrays are not as described, or use only the lowest of 256 levels.
    """
    where = "data"
    parts = checked_parts(Parts(train, train[:1] if test is None else test, columns), where)
    levels = _checked_levels(parts, levels, where, "levels")
    hidden = (missing[0], missing[1] if test is not None else None)
    given = zip(("x_train", "x_test"), (parts.train, parts.test), hidden, strict=True)
    masked_train, masked_test = (without(key, array, mask) for key, array, mask in given)
    parts = Parts(masked_train, masked_test, parts.columns)
    dataset = _split(ARRAYS, parts, levels, "arrays in memory", validation_fraction)
    return dataset if test is not None else dataset._replace(test=dataset.validation)


def _with_test(parts: Parts, where: str) -> Parts:
    """Set a fifth of the rows aside as test rows."""
    count = len(parts.train)
    if count < 5:
        raise UserError(
            f"{where}: at least 5 examples are needed to set some aside for the test, got {count}"
        )
    order, num_test = _fixed_permutation(count), count // 5
    return Parts(parts.train[order[num_test:]], parts.train[order[:num_test]], parts.columns)


def _checked_levels(parts: Parts, levels: int | None, where: str, option: str) -> int:
    """The number of levels, 256 if none is given; 0 for data that are no pixels.

    Raises:
        UserError: If a pixel lies above, or none is given and all are so low that another scale is
            meant: black and white as 0 and 1, say. Or if levels are given for other data.
    """
    if not is_image(parts.train):
        if levels is not None:
            raise UserError(f"{where}: {option} {levels} is for pixels, the data are none")
        return 0
    found = [int(part.max()) for part in (parts.train, parts.test) if part is not None]
    for key, highest in zip(("x_train", "x_test"), found, strict=True):
        if highest >= (levels or 256):
            raise UserError(
                f"{where}: pixels of {key} must lie below levels={levels}, got {highest}"
            )
    highest = max(found)
    if levels is None and 0 < highest < _UNLIKELY_BELOW:
        raise UserError(
            f"{where}: pixels lie from 0 to {highest}, which is unlikely for 256 levels; say how "
            f"many values a pixel may take: {option} {highest + 1}, or {option} 256"
        )
    return levels or 256


def is_available(name: str, data_dir: str | Path | None = None, *, stream: bool = False) -> bool:
    """Whether `load_dataset` would find the data on this machine, without a download.

    Looks at names of files only, so a broken file still counts. Imports neither TensorFlow nor
    tensorflow-datasets.
    """
    if stream:
        return find_streamable(name, data_dir) is not None and not lacking_to_stream()
    if name == "digits":
        return installed("sklearn") and not (data_dir and path_of(data_dir).is_file())
    return find_source(name, data_dir) is not None


def availability(
    name: str, data_dir: str | Path | None = None, *, stream: bool = False
) -> Availability:
    """Tell whether the data can be read on this machine, and if not, what that needs.

    Imports neither TensorFlow nor tensorflow-datasets.

    Raises:
        UserError: If the data cannot be read or downloaded: the name is not known, or `data_dir`
            does not hold the set.
    """
    if stream:
        refuse_to_stream_digits(name)
    if is_available(name, data_dir, stream=stream):
        return Availability.READABLE
    if name == "digits":
        refuse_file_for_digits(data_dir)
    if find_streamable(name, data_dir) is not None and (stream or data_dir is not None):
        return Availability.NEEDS_TFDS
    if data_dir is None:
        _require_preparable(name)
        return Availability.NEEDS_DOWNLOAD
    lacking = nothing_to_stream if stream else nothing_fits
    raise UserError(lacking(name, path_of(data_dir)))


def prepare_dataset(name: str, *, stream: bool = False) -> Path:
    """Download a known set with tensorflow-datasets and keep it in the cache as NAME.npz.

    Needs a network and TensorFlow. A set that is in the cache already is left as it is. Omniglot
    is inverted (bright ink on black) and reduced to 28 x 28; its split is the official one, by
    alphabet.

    Args:
        name: One of `KNOWN_DATASETS` other than digits.
        stream: Keep the directory of array_record files, which can be streamed, and no .npz file.

    Returns:
        The .npz file, with keys x_train and x_test; or the directory.

    Raises:
        UserError: If the name is not known, TensorFlow is missing, or downloading or writing fails.
    """
    _require_preparable(name)
    kept = find_streamable(name, None) if stream else cached_file(name)
    if kept is not None and kept.exists():
        return kept
    for module in ("tensorflow_datasets", "tensorflow"):
        if not installed(module):
            raise UserError(cannot_download(name, f"{module} is not installed"))
    cache = cache_dir()
    scratch = cache / f"{name}.tfds"
    unwritable = f"cannot write to the cache (VLAE_JAX_CACHE names another folder) {cache}"
    with one_line_error(unwritable, OSError):
        cache.mkdir(parents=True, exist_ok=True)
    builder = download(name, scratch)
    if stream:
        # Its own folder holds nothing but finished versions: what was downloaded stays behind.
        target = cache / TFDS_NAMES[name] / Path(builder.data_dir).name
        with one_line_error(unwritable, OSError):
            target.parent.mkdir(exist_ok=True)
            os.replace(builder.data_dir, target)
    else:
        target = cached_file(name)
        parts = read_builder(name, builder, scratch)
        with one_line_error(unwritable, OSError):
            write_npz(target, parts)
    shutil.rmtree(scratch, ignore_errors=True)
    return target


def _require_preparable(name: str) -> None:
    if name == "digits":
        raise UserError("digits comes with scikit-learn: there is nothing to prepare")
    if name not in KNOWN_DATASETS:
        raise UserError(
            f"unknown data set {name!r}{nearest(name, KNOWN_DATASETS)}; "
            f"for your own images put {name}.npz in a folder and give it as data_dir (--data-dir)"
        )


def _digits() -> Parts:
    if not installed("sklearn"):
        raise UserError("digits comes with scikit-learn: pip install scikit-learn")
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.uint8)[..., None]
    order = _fixed_permutation(len(images))
    num_test = len(images) // 5
    return Parts(images[order[num_test:]], images[order[:num_test]])


def _count_validation(num_train: int, validation_fraction: float) -> int:
    count = round(validation_fraction * num_train)
    if not 0 < count < num_train:
        raise UserError(
            f"validation_fraction {validation_fraction} of {num_train} training examples leaves "
            f"{count} for validation and {num_train - count} for training; both need one or more"
        )
    return count


def _split(
    name: str, parts: Parts, levels: int, source: str, validation_fraction: float
) -> Dataset:
    train, test, columns = parts
    assert test is not None
    num_validation = _count_validation(len(train), validation_fraction)
    order = _fixed_permutation(len(train))
    digest = hashlib.sha256()
    for images in (train, test):
        digest.update(repr(images.shape).encode())
        digest.update(np.ascontiguousarray(images).data)
    return Dataset(
        name=name,
        train=train[order[num_validation:]],
        validation=train[order[:num_validation]],
        test=test,
        levels=levels,
        source=source,
        fingerprint=digest.hexdigest()[:16],
        columns=columns,
    )


def _stream(name: str, data_dir: str | Path | None, validation_fraction: float) -> Dataset:
    """A data set whose training images stay on disk: equal to that of `_split`.

    One pass over them all takes their fingerprint and statistics, and keeps the validation images.
    """
    refuse_to_stream_digits(name)
    if lacking := lacking_to_stream():
        raise UserError(f"--stream needs {' and '.join(lacking)}: pip install 'vlae-jax[stream]'")
    folder = find_streamable(name, data_dir)
    if folder is None and data_dir is not None:
        raise UserError(nothing_to_stream(name, path_of(data_dir)))
    folder = folder or prepare_dataset(name, stream=True)
    builder = open_builder(folder)
    stored, test = (PreparedPart(name, builder, part, folder) for part in ("train", "test"))
    count = len(stored)
    num_validation = _count_validation(count, validation_fraction)
    order = _fixed_permutation(count).astype(np.int32 if count < 2**31 else np.int64)
    rank = np.empty_like(order)
    rank[order] = np.arange(count, dtype=order.dtype)
    digest = hashlib.sha256()
    for start in range(0, count, BATCH):
        images = stored.read(np.arange(start, min(start + BATCH, count)))
        if start == 0:
            shape = images.shape[1:]
            digest.update(repr((count, *shape)).encode())
            validation = np.empty((num_validation, *shape), np.uint8)
            counts = np.zeros((math.prod(shape), 256), np.int64)
        require_one_shape(shape, images.shape[1:], folder)
        digest.update(np.ascontiguousarray(images).data)
        ranks = rank[start : start + len(images)]
        is_set_aside = ranks < num_validation
        validation[ranks[is_set_aside]] = images[is_set_aside]
        add_value_counts(counts, images[~is_set_aside])
    tests = test.read_all()
    require_one_shape(shape, tests.shape[1:], folder)
    digest.update(repr(tests.shape).encode())
    digest.update(np.ascontiguousarray(tests).data)
    return Dataset(
        name=name,
        train=StoredImages(stored.read, order[num_validation:].copy(), shape, counts),
        validation=validation,
        test=tests,
        levels=256,
        source=f"tensorflow-datasets directory {folder}, streamed",
        fingerprint=digest.hexdigest()[:16],
    )


def _fixed_permutation(n: int) -> np.ndarray:
    # RandomState: numpy promises that its stream never changes; a Generator's may.
    return np.random.RandomState(_SPLIT_SEED).permutation(n)
