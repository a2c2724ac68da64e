"""The output density of each column, chosen in the configuration and checked against the data."""

import math

import numpy as np

from vlae_jax.data.dataset import Dataset
from vlae_jax.data.tables import check_continuous, column_words
from vlae_jax.errors import UserError
from vlae_jax.models.likelihoods import Group
from vlae_jax.runs.config import Config
from vlae_jax.runs.likelihoods import LIKELIHOODS, assigned

_MOST_CLASSES = 1000
_WANTED = {
    "counts": "counts 0, 1, 2, ...",
    "classes": "whole numbers 0, 1, 2, ..., one for each class",
    "binary": "0 and 1",
}


def groups_of(config: Config, dataset: Dataset) -> tuple[Group, ...]:
    """The columns that share a density.

    Raises:
        UserError: If the configuration does not assign each column a density, or the values of a
            column do not fit its own.
    """
    dim = math.prod(dataset.train.shape[1:])
    assignment = assigned(config.likelihood, dim, dataset.columns)
    one = len(assignment) == 1
    is_bernoulli = one and assignment[0][0] == "bernoulli"
    may_be_gray = config.data.preprocess != "none" or dataset.levels != 2
    if is_bernoulli and dataset.levels and may_be_gray and not config.binary:
        raise UserError(
            "a bernoulli likelihood needs binary images, but preprocess is "
            f"{config.data.preprocess!r}: choose static_binary or dynamic_binary, or a gaussian"
        )
    groups: list[Group] = []
    for kind, columns in assignment:
        places = () if one else columns
        classes = np.full(len(columns), dataset.levels)
        if not dataset.levels:
            classes = _classes(kind, columns, dataset)
        if kind == "categorical":
            for count in np.unique(classes):
                own = tuple(c for c, n in zip(columns, classes, strict=True) if n == count)
                groups.append(Group(kind, () if len(own) == dim else own, int(count)))
        elif kind == "gaussian" and config.model.variance == "heteroscedastic":
            floor = config.model.min_std
            groups.append(Group("gaussian_heteroscedastic", places, min_std=floor))
        else:
            levels = int(classes.max()) if kind == "discretized_logistic" else 0
            df = config.model.student_df if kind == "student_t" else 0.0
            groups.append(Group(kind, places, levels, df))
    return tuple(groups)


def is_continuous(groups: tuple[Group, ...], dim: int) -> np.ndarray:
    """Which columns hold measurements, which may be standardized: booleans (dim,)."""
    found = np.zeros(dim, bool)
    for group in groups:
        kind = group.kind.removesuffix("_heteroscedastic")
        found[list(group.columns) or slice(None)] = LIKELIHOODS[kind].values == "numbers"
    return found


def _classes(kind: str, columns: tuple[int, ...], dataset: Dataset) -> np.ndarray:
    """Check the values of measured columns; the number of classes of each, from the highest."""
    parts = (dataset.train, dataset.validation, dataset.test)
    rows = [np.asarray(part).reshape(len(part), -1) for part in parts]
    values = LIKELIHOODS[kind].values
    if values == "numbers":
        _check_numbers(rows[0], columns, dataset)
        return np.zeros(len(columns), int)
    found = np.concatenate(rows)[:, columns]
    low, high = (0, 1) if values == "binary" else (0, np.inf)
    is_wrong = (found < low) | (found > high) | (found != np.round(found))
    is_wrong &= ~np.isnan(found)
    if is_wrong.any():
        row, place = np.argwhere(is_wrong)[0]
        raise UserError(
            f"data: likelihood {kind} needs {_WANTED[values]}, and "
            f"{column_words(dataset.columns, columns[place])} holds {found[row, place]:g}"
        )
    if np.isnan(found).all(axis=0).any():
        place = int(np.argmax(np.isnan(found).all(axis=0)))
        what = column_words(dataset.columns, columns[place])
        raise UserError(f"data: {what} has no entry: leave it out")
    classes = np.nanmax(found, axis=0).astype(int) + 1
    if kind in ("categorical", "discretized_logistic"):
        for place, count in enumerate(classes):
            if not 2 <= count <= _MOST_CLASSES:
                raise UserError(
                    f"data: likelihood {kind} needs from 2 to {_MOST_CLASSES} different values "
                    f"0, 1, ..., and {column_words(dataset.columns, columns[place])} has {count}"
                )
    return classes


def _check_numbers(rows: np.ndarray, columns: tuple[int, ...], dataset: Dataset) -> None:
    if dataset.train.ndim == 2:  # type: ignore[union-attr]  # what streams are pixels
        check_continuous(rows, dataset.columns, np.array(columns))
    elif np.isnan(rows).all(axis=0).any() or np.nanmin(rows) == np.nanmax(rows):
        raise UserError("data: images are all equal, or an entry is missing in all of them")
