"""Numbers that are no pixels: tables and float images, from arrays, data frames and files."""

import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlae_jax.errors import UserError

TABLE_FILES = frozenset({".csv", ".parquet"})
"""Endings of the files that pyarrow reads."""
_UNRESOLVED = 1e-5
"""A standard deviation below this share of the mean leaves float32 fewer than two digits of it."""


class Table(NamedTuple):
    """An array, and the names of its columns where it has any."""

    values: np.ndarray
    columns: tuple[str, ...] | None = None


def as_table(given: Any, where: object) -> Table:
    """Take an array as it is, and a data frame column by column, its missing entries as NaN.

    A frame is anything with named columns of which `frame[name].to_numpy()` is an array: those of
    pandas and Polars, and tables of pyarrow. None of these libraries is imported.

    Raises:
        UserError: If a column holds anything but numbers; the message names it.
    """
    names = getattr(given, "column_names", None)
    if names is None and hasattr(given, "to_numpy"):
        names = getattr(given, "columns", None)
    if names is not None:
        names = tuple(str(name) for name in names)
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{where}: two columns are named {doubled!r}; rename one of them")
        originals = getattr(given, "column_names", None) or list(given.columns)
        columns = [
            _as_floats(np.asarray(given[original].to_numpy()), f"column {name!r}", where)
            for name, original in zip(names, originals, strict=True)
        ]
        if not columns:
            raise UserError(f"{where}: a table needs columns, it has none")
        return Table(np.stack(columns, axis=1), names)
    array = np.asarray(given)
    if array.dtype.kind in "OUSMmV" and array.ndim == 2:
        each = (_as_floats(column, f"column {i}", where) for i, column in enumerate(array.T))
        return Table(np.stack(list(each), axis=1))
    return Table(array)


def _as_floats(values: np.ndarray, what: str, where: object) -> np.ndarray:
    """One column as float64."""
    if values.ndim != 1:
        raise UserError(f"{where}: {what} must hold one number a row, got shape {values.shape}")
    if values.dtype.kind in "fiub":
        return values.astype(np.float64)
    if values.dtype.kind in "Mm":
        raise UserError(
            f"{where}: {what} holds dates or times: give numbers, such as days since a date"
        )
    found = np.full(len(values), np.nan)
    for row, value in enumerate(values):
        if value is None or type(value).__name__ in ("NAType", "NaTType"):
            continue
        if not isinstance(value, numbers.Real | np.bool_):
            numeric = np.isfinite(found[:row]).any()
            raise UserError(
                f"{where}: {what} holds {'numbers and ' if numeric else ''}{str(value)!r} (row "
                f"{row}): "
                "give classes as whole numbers 0, 1, ... with likelihood categorical, an empty "
                "entry or NaN for a missing value, or leave the column out"
            )
        found[row] = value
    return found


def numbers_of(key: str, given: Table, where: object) -> np.ndarray:
    """Check an array of numbers that are no pixels: floats, with NaN for missing entries.

    Args:
        key: The name of the array, for messages.
        given: A table (n, dim) of any numbers, or float images (n, height, width[, channel]).
        where: The place of the array, for messages.

    Returns:
        float32 or float64, (n, dim) or (n, height, width, channel).

    Raises:
        UserError: If it is not so, or a number is infinite or too large for float32.
    """
    array, columns = given
    if array.ndim == 1:
        raise UserError(
            f"{where}: {key} must have a row for each example, got shape {array.shape}; "
            "for one column give shape (n, 1)"
        )
    if array.ndim > 2 and array.dtype.kind in "iub":
        raise UserError(
            f"{where}: {key} must be uint8 (pixels 0 to 255) or floats (measurements), got "
            f"{array.dtype}"
        )
    if array.dtype.kind not in "fiub" or array.ndim not in (2, 3, 4):
        raise UserError(
            f"{where}: {key} must be numbers of shape (n, columns), or images (n, height, width) "
            f"or (n, height, width, channel), got {array.dtype} {array.shape}"
        )
    if array.size == 0:
        raise UserError(
            f"{where}: {key} is empty, its shape is {array.shape}; at least one row is needed"
        )
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.float32:
        array = array.astype(np.float64)
    flat = array.reshape(len(array), -1)
    with np.errstate(over="ignore"):
        infinite = np.isinf(flat.astype(np.float32))
    if infinite.any():
        row, column = np.argwhere(infinite)[0]
        raise UserError(
            f"{where}: {key} holds {flat[row, column]:g} in row {row}, "
            f"{column_words(columns, column)}: give finite numbers, NaN where a value is missing"
        )
    return array


def column_words(columns: Sequence[str] | None, index: int) -> str:
    """A column in words: by its name, or else its number from 0."""
    return f"column {columns[index]!r}" if columns else f"column {index} (from 0)"


def check_continuous(values: np.ndarray, columns: Sequence[str] | None, which: np.ndarray) -> None:
    """Check that measurements vary, and by more than float32 resolves.

    Args:
        values: (n, dim), NaN where missing.
        columns: Names, or None.
        which: Indices of the columns to check.

    Raises:
        UserError: If a column has no entry, is constant, or varies too little around its mean.
    """
    for index in which:
        column = values[:, index]
        column = column[~np.isnan(column)].astype(np.float64)
        what = column_words(columns, index)
        if not len(column):
            raise UserError(f"data: {what} has no entry in the training rows: leave it out")
        mean, std = column.mean(), column.std()
        if column.min() == column.max():
            raise UserError(
                f"data: {what} is constant in the training rows, {column[0]:g}: leave it out"
            )
        if std < _UNRESOLVED * abs(mean):
            raise UserError(
                f"data: {what} varies by {std:.3g} around {mean:.8g}, less than float32 resolves: "
                "subtract a constant from it"
            )


def read_table(path: Path) -> Table:
    """Read a CSV or Parquet file with pyarrow.

    A first line of a CSV file that holds numbers alone counts as a row, and the columns then have
    no names. Empty entries, NA and NaN are missing values.

    Raises:
        UserError: If it cannot be read, or pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import csv, parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow: pip install 'vlae-jax[tables]'") from None
    try:
        if path.suffix.lower() == ".parquet":
            return as_table(parquet.read_table(path), path)
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline().strip()
        has_names = not all(map(_is_number, first.split(",")))
        options = csv.ReadOptions(autogenerate_column_names=not has_names)
        read = as_table(csv.read_csv(path, read_options=options), path)
        return read if has_names else Table(read.values)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a table: {error}") from None


def _is_number(word: str) -> bool:
    try:
        float(word.strip().strip('"'))
    except ValueError:
        return False
    return True
