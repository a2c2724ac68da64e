"""Tables: frames, files and arrays read alike, or refused in a line that names the column."""

import collections

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from vlae_jax.data.preprocessing import fit_preprocessor, fixed_keys
from vlae_jax.data.sets import dataset_from_arrays, load_dataset
from vlae_jax.data.supplied import as_dataset, read_rows
from vlae_jax.data.tables import as_table, check_continuous
from vlae_jax.errors import UserError
from vlae_jax.runs.config import DataConfig

NAMES = ("age", "blood pressure", "children")


def values(rows: int = 20, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack(
        [rng.normal(50, 9, rows), rng.normal(120, 15, rows), rng.poisson(2, rows)], axis=1
    )


class Frame:
    """The part of a data frame of pandas or Polars that is used: names, and columns by name."""

    def __init__(self, columns: dict) -> None:
        self._columns = columns
        self.columns = list(columns)

    def __getitem__(self, name: str) -> "Column":
        return Column(self._columns[name])

    def to_numpy(self) -> np.ndarray:
        raise AssertionError("a frame of several types as one array is an array of objects")


Column = collections.namedtuple("Column", "values")
Column.to_numpy = lambda self: np.asarray(self.values)


def test_frames_keep_names_and_values_and_mark_what_is_missing():
    given = {"age": [3, 4, 5], "ok": [True, False, True], "size": [0.5, None, float("nan")]}
    expected = [[3, 1, 0.5], [4, 0, np.nan], [5, 1, np.nan]]
    for frame in (Frame(given), pa.table(given)):
        read = as_table(frame, "data")
        assert read.columns == ("age", "ok", "size")
        np.testing.assert_array_equal(read.values, expected)
    np.testing.assert_array_equal(as_table(np.array(expected, object), "data").values, expected)


@pytest.mark.parametrize("ending", ["csv", "parquet", "npy", "npz"])
def test_a_file_gives_the_table_that_was_written(tmp_path, ending):
    table, path = values(), tmp_path / f"health.{ending}"
    table[3, 1] = np.nan
    arrow = pa.table(dict(zip(NAMES, table.T, strict=True)), metadata={})
    write = {
        "csv": lambda: csv.write_csv(
            pa.table(
                {n: pa.array(c, from_pandas=True) for n, c in zip(NAMES, table.T, strict=True)}
            ),
            path,
        ),
        "parquet": lambda: parquet.write_table(arrow, path),
        "npy": lambda: np.save(path, table),
        "npz": lambda: np.savez(path, x=table, columns=np.array(NAMES)),
    }
    write[ending]()
    for data_dir in (path, tmp_path):
        found = load_dataset("health", data_dir, validation_fraction=0.25)
        assert found.columns == (None if ending == "npy" else NAMES)
        assert found.levels == 0 and found.incomplete
        assert [len(part) for part in (found.train, found.validation, found.test)] == [12, 4, 4]
        everything = np.concatenate([found.train, found.validation, found.test])
        order = np.argsort(everything[:, 0])
        np.testing.assert_allclose(everything[order], table[np.argsort(table[:, 0])], rtol=1e-12)
        assert found.description.startswith("table of 20 rows and 3 columns, ")


def test_columns_of_a_file_are_found_by_name(tmp_path):
    table, path = values(4), tmp_path / "new.csv"
    shuffled = (2, 0, 1)
    columns = {NAMES[i]: table[:, i] for i in shuffled} | {"other": np.zeros(4)}
    csv.write_csv(pa.table(columns), path)
    np.testing.assert_allclose(read_rows(path, (3,), NAMES), table, rtol=1e-12)
    with pytest.raises(UserError, match=r"new.csv has no column 'weight'.*it has children, age"):
        read_rows(path, (2,), ("age", "weight"))


def test_a_first_line_of_numbers_is_a_row(tmp_path):
    path = tmp_path / "plain.csv"
    path.write_text("1,2\n3,4\n5,\n7,8\n9,10\n")
    found = load_dataset("plain", path, validation_fraction=0.25)
    assert found.columns is None
    assert sum(map(len, (found.train, found.validation, found.test))) == 5


WORDS = np.array([[1.0, "n/a"], [2.0, 3.0]], object)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (pa.table({"kind": ["a", "b"]}), r"column 'kind' holds 'a' \(row 0\): give classes as"),
        (pa.table({"kind": np.array(["2020-01-01"], "M8[D]")}), "column 'kind' holds dates"),
        (Frame({"age": [1, "old"]}), "column 'age' holds 'old'|column 'age' holds '1'"),
        (Frame({"age": np.array([1, "old"], object)}), "'age' holds numbers and 'old' .row 1."),
        (WORDS, r"column 1 holds 'n/a' \(row 0\)"),
        (np.array([[1.0, 2.0], [np.inf, 3.0]]), r"x_train holds inf in row 1, column 0"),
        (np.array([[1.0, 1e39]]), r"holds 1e\+39 in row 0, column 1"),
        (np.arange(3.0), r"for one column give shape \(n, 1\)"),
        (np.zeros((0, 3)), "x_train is empty"),
        (np.zeros((4, 3, 2), int), "must be uint8 .* or floats"),
        (np.zeros((4, 3), complex), "must be numbers of shape"),
        (np.arange(8.0).reshape(4, 2)[:1], "leaves 0 for validation"),
    ],
)
def test_wrong_tables(given, said):
    with pytest.raises(UserError, match=said) as caught:
        as_dataset(given, DataConfig())
    assert "\n" not in str(caught.value)


def test_other_wrong_data():
    for arrays, said in [
        ({"x_train": values(), "x_test": values()[:, :2]}, "rows of one length are needed"),
        ({"x_train": values(), "levels": 9}, "levels 9 is for pixels"),
        ({"x_train": values(), "missing_train": np.zeros((20, 3))}, "must be booleans"),
        ({"x_train": pa.table({"a": [1.0]}), "x_test": pa.table({"b": [1.0]})}, "columns of x_tr"),
    ]:
        with pytest.raises(UserError, match=said):
            as_dataset(arrays, DataConfig())


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (np.full(20, 3.5), "'age' is constant in the training rows, 3.5: leave it out"),
        (np.full(20, np.nan), "'age' has no entry"),
        (1.7e9 + np.arange(20), "'age' varies by 5.77 around 1.7e.09.*subtract a constant"),
    ],
)
def test_columns_that_cannot_be_modeled(column, said):
    table = values()
    table[:, 0] = column
    with pytest.raises(UserError, match=said):
        check_continuous(table, NAMES, np.arange(3))


def test_masks_of_missing_entries_become_nan():
    """In images of pixels too; the statistics are then those of what is there."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (30, 2, 3, 1), np.uint8)
    mask = rng.random(images.shape) < 0.3
    found = dataset_from_arrays(images, missing=(mask, None))
    assert found.levels == 256 and found.incomplete
    assert np.isnan(found.train).sum() + np.isnan(found.validation).sum() == mask.sum()
    fitted = fit_preprocessor(found.train, kind="raw", incomplete=True)
    flat = found.train.reshape(len(found.train), -1) / 255
    np.testing.assert_allclose(fitted.mean, np.nanmean(flat, axis=0), atol=1e-6)
    np.testing.assert_allclose(fitted.variance, np.nanvar(flat, axis=0), atol=1e-6)


def test_standardizing_takes_mean_and_deviation_of_each_column():
    table = values(50)
    table[4, 2] = np.nan
    fitted = fit_preprocessor(table, kind="standardize", levels=0, incomplete=True)
    mean, std = np.nanmean(table, axis=0), np.nanstd(table, axis=0)
    for row in (table[0], table[4]):
        x, log_det = fitted.apply(fixed_keys(1)[0], row)
        there = ~np.isnan(row)
        np.testing.assert_allclose(x[there], ((row - mean) / std)[there], rtol=1e-5)
        assert np.isnan(x[~there]).all()
        np.testing.assert_allclose(log_det, -np.log(std)[there].sum(), rtol=1e-6)
        np.testing.assert_allclose(fitted.to_pixels(x)[there], row[there], rtol=1e-5)


def test_images_of_measurements_have_one_scale():
    images = np.random.default_rng(0).normal(2.0, 3.0, (40, 2, 2, 1))
    images[:, 0, 0] = 7.0  # a constant entry is no error in an image
    fitted = fit_preprocessor(images, kind="standardize", levels=0)
    flat = images.reshape(40, -1)
    expected = np.sqrt(flat.var(axis=0).mean())
    np.testing.assert_allclose(fitted.scale, np.full(4, expected), rtol=1e-6)
    np.testing.assert_allclose(fitted.mean, flat.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "kind", "levels", "said"),
    [
        (values(), "logit", 0, "logit is for pixels"),
        (np.zeros((3, 2, 2, 1), np.uint8), "standardize", 256, "standardize is for measurements"),
        (values().astype(np.uint8), "none", 0, "must be floats"),
    ],
)
def test_preprocessing_of_the_other_kind_is_refused(array, kind, levels, said):
    with pytest.raises(ValueError, match=said):
        fit_preprocessor(array, kind=kind, levels=levels)
