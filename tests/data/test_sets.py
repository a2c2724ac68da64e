"""Loading: every source, the order of search, and what is said when something is wrong."""

import contextlib
import gzip
import importlib.util
import json
import shutil
import socket
import struct
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from vlae_jax.data.formats import write_npz
from vlae_jax.data.prepared import (
    KNOWN_DATASETS,
    cache_dir,
    reduce_omniglot,
    unresolved_host,
)
from vlae_jax.data.sets import (
    Availability,
    Dataset,
    availability,
    is_available,
    load_dataset,
    prepare_dataset,
)
from vlae_jax.errors import UserError

TFDS_ROOT = Path(__file__).parents[1] / "fixtures" / "tfds"
TFDS_FOLDER = TFDS_ROOT / "mnist" / "3.0.1"
needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="needs tensorflow-datasets"
)


def numbered_images(numbers: range, shape: tuple[int, ...] = (6, 5, 1)) -> np.ndarray:
    """Images whose first pixel is their number."""
    images = np.random.default_rng(0).integers(0, 256, (len(numbers), *shape), np.uint8)
    images.reshape(len(numbers), -1)[:, 0] = numbers
    return images


TRAIN, TEST = numbered_images(range(20)), numbered_images(range(100, 107))


def save_npz(path: Path, train: np.ndarray = TRAIN, test: np.ndarray = TEST) -> Path:
    np.savez_compressed(path, x_train=train, x_test=test)
    return path


def idx_bytes(images: np.ndarray) -> bytes:
    return struct.pack(">4B3I", 0, 0, 8, 3, *images.shape[:3]) + images.tobytes()


def save_idx(folder: Path, dot: str = "-", end: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, images in (("train", TRAIN), ("t10k", TEST)):
        content = idx_bytes(images)
        path = folder / f"{part}-images{dot}idx3-ubyte{end}"
        path.write_bytes(gzip.compress(content) if end else content)


def numbers(images: np.ndarray) -> list[int]:
    return sorted(int(image.flat[0]) for image in images)


def assert_holds_the_numbered_images(dataset: Dataset) -> None:
    np.testing.assert_array_equal(dataset.test, TEST)
    kept = np.concatenate([dataset.train, dataset.validation])
    np.testing.assert_array_equal(kept[np.argsort([image.flat[0] for image in kept])], TRAIN)
    assert len(dataset.validation) == 2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own, and no proxy."""
    monkeypatch.setenv("VLAE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.getproxies", dict)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def tensorflow_installed(monkeypatch):
    """Let the code believe that TensorFlow is installed; calls of it are not reached."""
    find_spec = importlib.util.find_spec

    def find(name, *more):
        return ModuleSpec(name, None) if name == "tensorflow" else find_spec(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.fixture
def names_resolve(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_args, **_kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


# Sources


def test_digits_is_split_the_same_way_each_time():
    dataset = load_dataset("digits")
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [part.shape for part in parts] == [(1294, 8, 8, 1), (144, 8, 8, 1), (359, 8, 8, 1)]
    assert {part.dtype for part in parts} == {np.dtype(np.uint8)}
    assert (dataset.levels, dataset.train.min(), dataset.train.max()) == (17, 0, 16)
    # Nothing is lost or repeated: scikit-learn's own total over all 1797 images.
    assert sum(int(part.sum(dtype=np.int64)) for part in parts) == 561718
    again = load_dataset("digits", validation_fraction=0.2)
    assert again.fingerprint == dataset.fingerprint
    np.testing.assert_array_equal(again.test, dataset.test)
    assert len(again.validation) == 288


@pytest.mark.parametrize("name", ["mnist", "cifar10", "my_own"])
def test_npz_in_a_folder_or_as_a_file(tmp_path, name):
    path = save_npz(tmp_path / f"{name}.npz")
    for data_dir in (tmp_path, str(path)):
        assert is_available(name, data_dir)
        dataset = load_dataset(name, data_dir)
        assert_holds_the_numbered_images(dataset)
        assert (dataset.name, dataset.levels, dataset.source) == (name, 256, str(path))


def test_npz_without_a_channel_axis(tmp_path):
    save_npz(tmp_path / "mnist.npz", TRAIN[..., 0], TEST[..., 0])
    assert_holds_the_numbered_images(load_dataset("mnist", tmp_path))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "my_own"])
@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "NAME"])
def test_idx_files(tmp_path, name, dot, end, folder):
    save_idx(tmp_path / folder.replace("NAME", name), dot, end)
    assert is_available(name, tmp_path)
    assert_holds_the_numbered_images(load_dataset(name, tmp_path))


def test_idx_files_are_not_taken_for_a_set_that_never_comes_so(tmp_path):
    save_idx(tmp_path)
    assert not is_available("cifar10", tmp_path)
    with pytest.raises(UserError, match="no cifar10 in data_dir"):
        load_dataset("cifar10", tmp_path)


@needs_tfds
@pytest.mark.parametrize("data_dir", [TFDS_ROOT, TFDS_ROOT / "mnist", TFDS_FOLDER])
def test_prepared_directory_is_read_without_tensorflow(data_dir):
    """The fixture's images are a formula of their number: see make_tfds_fixture.py."""
    assert is_available("mnist", data_dir)
    dataset = load_dataset("mnist", data_dir)
    assert numbers(dataset.test) == list(range(100, 106))
    assert numbers(np.concatenate([dataset.train, dataset.validation])) == list(range(12))
    row, column = np.mgrid[:28, :28]
    for image in dataset.test:
        np.testing.assert_array_equal(
            image[..., 0], (int(image[0, 0, 0]) + 3 * row + 7 * column) % 256
        )
    assert "tensorflow" not in sys.modules


@needs_tfds
def test_the_newest_prepared_version_is_read(tmp_path):
    shutil.copytree(TFDS_FOLDER, tmp_path / "mnist" / "3.0.1")
    newer = shutil.copytree(TFDS_FOLDER, tmp_path / "mnist" / "3.0.10")
    edit_json(newer / "dataset_info.json", version="3.0.10")
    assert load_dataset("mnist", tmp_path).source.endswith("3.0.10")


class Examples(list):
    """A data source of given images; that of `mock_data` itself cannot be read in batches."""

    def __getitems__(self, indices):
        return [{"image": self[i]} for i in indices]


@contextlib.contextmanager
def downloadable(train: np.ndarray, test: np.ndarray):
    """The library's own mock: its real builders, which download nothing and hold these images."""
    import tensorflow_datasets as tfds

    def source(self, split):
        return Examples({"train": train, "test": test}[split])

    with tfds.testing.mock_data(as_data_source_fn=source):
        yield


@needs_tfds
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "svhn", "cifar10"])
def test_prepare_fills_the_cache(tensorflow_installed, names_resolve, monkeypatch, cache, name):
    monkeypatch.setattr("vlae_jax.data.prepared.BATCH", 6)
    with downloadable(TRAIN, TEST):
        assert prepare_dataset(name) == cache / f"{name}.npz"
    assert [file.name for file in cache.iterdir()] == [f"{name}.npz"]
    assert_holds_the_numbered_images(load_dataset(name))


@needs_tfds
def test_omniglot_is_reduced_when_prepared(tensorflow_installed, names_resolve):
    paper = np.full((4, 105, 105, 3), 255, np.uint8)
    half = paper.copy()
    half[:, :, 60:] = 0
    with downloadable(paper, half):
        dataset = load_dataset("omniglot", validation_fraction=0.5)
    assert dataset.train.shape == (2, 28, 28, 1) and not dataset.train.any()
    np.testing.assert_array_equal(
        dataset.test, np.broadcast_to(np.where(np.arange(28) < 16, 0, 255)[:, None], (4, 28, 28, 1))
    )


@pytest.mark.parametrize("decoded", ["0/1", "0/255", "0/255 with 3 channels"])
def test_omniglot_cells_are_averages_of_the_ink(decoded):
    """15 x 15 blocks after repeating each pixel 4 times; and ink is bright."""
    ink = np.random.default_rng(0).random((3, 105, 105)) < 0.1
    fine = ink.repeat(4, axis=1).repeat(4, axis=2).reshape(3, 28, 15, 28, 15)
    images = (~ink).astype(np.uint8) * (1 if decoded == "0/1" else 255)
    if "channels" in decoded:
        images = np.stack([images] * 3, axis=-1)
    reduced = reduce_omniglot(images)
    assert reduced.dtype == np.uint8
    np.testing.assert_array_equal(reduced[..., 0], np.rint(255 * fine.mean(axis=(2, 4))))


# Order of search


def test_cache_is_read_without_data_dir_and_never_with_it(cache, tmp_path):
    save_npz(cache / "mnist.npz")
    assert is_available("mnist")
    assert_holds_the_numbered_images(load_dataset("mnist"))
    (tmp_path / "empty").mkdir()
    assert not is_available("mnist", tmp_path / "empty")
    with pytest.raises(UserError, match="no mnist in data_dir"):
        load_dataset("mnist", tmp_path / "empty")


def test_prepare_leaves_a_cached_file_alone(cache):
    path = save_npz(cache / "mnist.npz")
    before = path.read_bytes()
    assert prepare_dataset("mnist") == path and path.read_bytes() == before


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"VLAE_JAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/vlae_jax")),
        ({}, Path.home() / ".cache/vlae_jax"),
    ],
)
def test_cache_folder(monkeypatch, variables, expected):
    for variable in ("VLAE_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert cache_dir() == expected


def test_a_set_is_never_replaced_by_another(tmp_path):
    mnist = save_npz(tmp_path / "mnist.npz")
    save_idx(tmp_path / "fashion-mnist")
    for name, data_dir in (
        ("fashion_mnist", mnist),
        ("mnist", tmp_path / "fashion-mnist"),
        ("cifar10", TFDS_FOLDER),
        ("digits", mnist),
    ):
        assert not is_available(name, data_dir)
        with pytest.raises(UserError):
            load_dataset(name, data_dir)


@needs_tfds
def test_is_available_imports_nothing_heavy():
    code = (
        f"import sys; from vlae_jax.data.sets import is_available;"
        f"a = is_available('mnist', {str(TFDS_ROOT)!r});"
        "b = is_available('digits'); c = is_available('no_such'); print(a, b, c,"
        "any(m in sys.modules for m in ('tensorflow', 'tensorflow_datasets', 'sklearn')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False", "False"]


# The split


def test_validation_is_a_fixed_part_of_train(tmp_path):
    """Stored numbers: the split must not move between releases, or runs could not be compared."""
    save_npz(tmp_path / "mnist.npz")
    first, second = (load_dataset("mnist", tmp_path, validation_fraction=0.25) for _ in range(2))
    assert numbers(first.validation) == [1, 8, 10, 18, 19]
    assert numbers(first.train) == sorted(set(range(20)) - {1, 8, 10, 18, 19})
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(first.train, second.train)


def test_fingerprint_sees_one_pixel(tmp_path):
    changed = TEST.copy()
    changed[3, 2, 1, 0] ^= 1
    prints = [
        load_dataset("own", save_npz(tmp_path / "own.npz", TRAIN, test)).fingerprint
        for test in (TEST, changed, TEST)
    ]
    assert prints[0] == prints[2] != prints[1] and len(prints[0]) == 16


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.99, 1.0])
def test_an_empty_part_is_refused(tmp_path, fraction):
    save_npz(tmp_path / "mnist.npz")
    with pytest.raises(UserError, match="both need one or more"):
        load_dataset("mnist", tmp_path, validation_fraction=fraction)


# What is said


def refused(name: str, data_dir: Path | None = None) -> str:
    """The one line with which loading fails."""
    with pytest.raises(UserError) as caught:
        load_dataset(name, data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": TRAIN}, "needs the keys x_train and x_test; it has ['images']"),
        ({"x_train": TRAIN, "y_train": TRAIN}, "it has ['x_train', 'y_train']"),
        ({"x_train": TRAIN, "x_test": TEST / 255}, "x_test must be uint8"),
        ({"x_train": TRAIN.astype(object), "x_test": TEST}, "not a readable .npz"),
        ({"x_train": TRAIN.reshape(20, -1), "x_test": TEST}, "got (20, 30)"),
        ({"x_train": TRAIN[..., None], "x_test": TEST}, "got (20, 6, 5, 1, 1)"),
        ({"x_train": TRAIN, "x_test": TEST[:, :5]}, "got (6, 5, 1) and (5, 5, 1)"),
        ({"x_train": TRAIN, "x_test": TEST[:0]}, "x_test is empty"),
        ({"x_train": TRAIN[:, :0], "x_test": TEST[:, :0]}, "x_train is empty"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, said):
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays)
    message = refused("mnist", tmp_path)
    assert said in message and str(path) in message


def broken_files(tmp_path: Path) -> dict[str, bytes]:
    good = save_npz(tmp_path / "good.npz").read_bytes()
    flipped = bytearray(good)
    flipped[100] ^= 255
    np.save(tmp_path / "lone.npy", TRAIN)
    return {
        "empty": b"",
        "text": b"not an archive\n",
        "truncated": good[: len(good) // 2],
        "no directory": good[:-30],
        "flipped": bytes(flipped),
        "a lone array": (tmp_path / "lone.npy").read_bytes(),
    }


@pytest.mark.parametrize(
    "how", ["empty", "text", "truncated", "no directory", "flipped", "a lone array"]
)
def test_broken_npz(tmp_path, how):
    path = tmp_path / "mnist.npz"
    path.write_bytes(broken_files(tmp_path)[how])
    assert f"{path} is not a readable .npz file" in refused("mnist", path)


@pytest.mark.parametrize(
    ("content", "end", "said"),
    [
        (idx_bytes(TEST)[:-1], "", "is truncated or damaged: 209 bytes of pixels, but 7 x 6 x 5"),
        (idx_bytes(TEST) + b"!", "", "is truncated or damaged"),
        (idx_bytes(TEST)[:10], "", "is not an idx file of images"),
        (struct.pack(">4BI", 0, 0, 8, 1, 7) + bytes(20), "", "is not an idx file of images"),
        (b"", "", "is not an idx file of images"),
        (gzip.compress(idx_bytes(TEST))[:-20], ".gz", "is not a readable idx file"),
        (idx_bytes(TEST), ".gz", "is not a readable idx file"),
        (idx_bytes(TEST[:0]), "", "x_test is empty"),
    ],
)
def test_broken_idx(tmp_path, content, end, said):
    save_idx(tmp_path, end=end)
    (tmp_path / f"t10k-images-idx3-ubyte{end}").write_bytes(content)
    assert said in refused("mnist", tmp_path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_prepared(folder: Path, how: str) -> None:
    info, records = folder / "dataset_info.json", folder / "mnist-test.array_record-00000-of-00001"
    if how == "other format":
        edit_json(info, fileFormat="tfrecord")
    elif how == "no test split":
        edit_json(info, splits=json.loads(info.read_text())["splits"][:1])
    elif how == "no features":
        (folder / "features.json").unlink()
    elif how == "no records":
        records.unlink()
    else:
        records.write_bytes(b"x" * records.stat().st_size)


@needs_tfds
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("other format", "must be in the array_record format"),
        ("no test split", "cannot read the test split"),
        ("no features", "cannot read"),
        ("no records", "cannot read the test split"),
        ("damaged records", "cannot read the test split"),
    ],
)
def test_broken_prepared_directory(tmp_path, how, said):
    folder = shutil.copytree(TFDS_FOLDER, tmp_path / "mnist" / "3.0.1")
    break_prepared(folder, how)
    message = refused("mnist", tmp_path)
    assert said in message and str(folder) in message


def test_nothing_in_data_dir(tmp_path):
    save_npz(tmp_path / "mnist_small.npz")
    message = refused("mnist", tmp_path)
    for part in ("mnist.npz", "train-images-idx3-ubyte", "tensorflow-datasets", "mnist_small.npz"):
        assert part in message
    assert "does not exist" in refused("mnist", tmp_path / "nowhere")
    (tmp_path / "note.txt").write_text("")
    assert "is not an .npz file of mnist" in refused("mnist", tmp_path / "note.txt")


def test_a_mistyped_name(tmp_path, cache):
    save_npz(cache / "mnits.npz")
    assert not is_available("mnits")
    assert "did you mean 'mnist'?" in refused("mnits")
    assert "did you mean 'mnist'?" in refused("mnits", tmp_path)


@pytest.mark.parametrize("missing", ["tensorflow", "tensorflow_datasets"])
def test_missing_package_names_the_extra(monkeypatch, missing, cache):
    monkeypatch.setitem(sys.modules, missing, None)
    message = refused("cifar10")
    assert f"{missing} is not installed" in message and "'vlae-jax[train,prepare]'" in message
    assert list(cache.iterdir()) == []


@needs_tfds
@pytest.mark.parametrize("name", KNOWN_DATASETS[1:])
def test_offline_is_noticed_at_once(tensorflow_installed, no_network, name, cache):
    started = time.perf_counter()
    message = refused(name)
    assert time.perf_counter() - started < 5
    for way_out in (f"`vlae_jax prepare {name}`", "--data-dir", f"{name}.npz", str(cache)):
        assert way_out in message
    assert "does not resolve" in message and not is_available(name)


def test_a_proxy_resolves_names_itself(no_network, monkeypatch):
    urls = ["https://example.org/a", "https://example.org/b"]
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"no": "localhost"})
    assert unresolved_host(urls) == "example.org"
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:1"})
    assert unresolved_host(urls) is None


@needs_tfds
def test_a_failed_download_is_one_line(tensorflow_installed, names_resolve, monkeypatch):
    import tensorflow_datasets as tfds

    def fail(self, **_kwargs):
        raise ConnectionError("Max retries exceeded\nwith a long tail")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    assert "ConnectionError: Max retries exceeded with a long tail" in refused("mnist")


def test_digits_needs_no_preparing_but_scikit_learn(monkeypatch):
    with pytest.raises(UserError, match="nothing to prepare"):
        prepare_dataset("digits")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert not is_available("digits")
    assert "pip install scikit-learn" in refused("digits")


def test_an_interrupted_write_leaves_no_cache_file(monkeypatch, cache):
    def fail(file, **_arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="No space"):
        write_npz(cache / "mnist.npz", (TRAIN, TEST))
    assert list(cache.iterdir()) == []


@needs_tfds
def test_records_are_kept_to_be_streamed(tensorflow_installed, names_resolve, monkeypatch, cache):
    """Beside an .npz file, which cannot be; what was downloaded goes, and all is done but once."""
    import tensorflow_datasets as tfds

    def download_and_prepare(self, **options):
        assert options["file_format"] == "array_record"
        (Path(self._data_dir_root) / "downloads").mkdir(parents=True)
        shutil.copytree(TFDS_FOLDER, self.data_dir)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    save_npz(cache / "mnist.npz")
    assert availability("mnist", stream=True) is Availability.NEEDS_DOWNLOAD
    assert prepare_dataset("mnist", stream=True) == cache / "mnist" / "3.0.1"
    assert sorted(file.name for file in cache.iterdir()) == ["mnist", "mnist.npz"]
    monkeypatch.delattr(tfds.core.DatasetBuilder, "download_and_prepare")
    assert prepare_dataset("mnist", stream=True) == cache / "mnist" / "3.0.1"
    assert availability("mnist", stream=True) is Availability.READABLE
    assert numbers(load_dataset("mnist", stream=True).test) == list(range(100, 106))


def test_a_cache_that_cannot_be_made(tensorflow_installed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLAE_JAX_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot write to the cache (VLAE_JAX_CACHE" in refused("mnist")


def test_availability_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("VLAE_JAX_CACHE", str(tmp_path / "cache"))
    assert availability("digits") is Availability.READABLE
    assert availability("mnist") is Availability.NEEDS_DOWNLOAD
    assert availability("mnist", TFDS_ROOT) is Availability.READABLE
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert availability("mnist", TFDS_ROOT) is Availability.NEEDS_TFDS
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        availability("mnits")
    with pytest.raises(UserError, match="no svhn in data_dir"):
        availability("svhn", TFDS_ROOT)
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(UserError, match="comes with scikit-learn"):
        availability("digits", tmp_path / "x.npz")
