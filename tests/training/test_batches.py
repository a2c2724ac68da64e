"""Images that stay on disk: the same run as in memory, each process with its own rows."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import chex
import numpy as np
import pytest
from builders import last_state, records, refused, untrained

from vlae_jax.data.sets import Availability, Dataset, availability, load_dataset
from vlae_jax.data.stored import StoredImages, mean_image, value_counts
from vlae_jax.errors import UserError
from vlae_jax.parallel.placement import Placement
from vlae_jax.runs.config import Config, DataConfig, InferenceConfig, ModelConfig, TrainingConfig
from vlae_jax.runs.folder import RunFolder
from vlae_jax.training.batches import StreamedImages, epoch_order
from vlae_jax.training.loop import FitOptions, fit
from vlae_jax.training.step import Trainer

pytestmark = [
    pytest.mark.usefixtures("make_trainer"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("array_record", "grain")),
        reason="needs the stream extra",
    ),
]

SHAPE = (6, 5, 1)
TRAINING = TrainingConfig(epochs=3, batch_size=8, learning_rate=1e-2, seed=2)
KEPT = FitOptions(log_every=1, checkpoint_every=3)


def random_images(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)


TRAIN, TEST = random_images(0, 45), random_images(1, 7)


def prepare(root: Path, shards: int = 3) -> Path:
    """Write a data set named doodles as tensorflow-datasets does, and return its version folder."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    def record(image):
        file, example = io.BytesIO(), tf_example_pb2.Example()
        Image.fromarray(image[..., 0]).save(file, "png")
        example.features.feature["image"].bytes_list.value.append(file.getvalue())
        return example.SerializeToString()

    folder = root / "doodles" / "1.0.0"
    folder.mkdir(parents=True)
    splits = []
    for split, images, count in (("train", TRAIN, shards), ("test", TEST, 1)):
        parts = np.array_split(images, count)
        for number, part in enumerate(parts):
            name = f"doodles-{split}.array_record-{number:05d}-of-{count:05d}"
            writer = ArrayRecordWriter(str(folder / name), "group_size:1")
            for image in part:
                writer.write(record(image))
            writer.close()
        splits.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1",
                "shardLengths": [str(len(part)) for part in parts],
            }
        )
    about = {"fileFormat": "array_record", "name": "doodles", "version": "1.0.0", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(about))
    features = "tensorflow_datasets.core.features"
    image = {"dtype": "uint8", "shape": {"dimensions": [str(length) for length in SHAPE]}}
    feature = {"image": image, "pythonClassName": f"{features}.image_feature.Image"}
    (folder / "features.json").write_text(
        json.dumps(
            {
                "featuresDict": {"features": {"image": feature}},
                "pythonClassName": f"{features}.features_dict.FeaturesDict",
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prepared")
    prepare(path)
    return path


def config(root: Path, *, stream: bool) -> Config:
    return Config(
        data=DataConfig(dataset="doodles", data_dir=str(root), stream=stream),
        model=ModelConfig(latent=2, hidden=(8,)),
        inference=InferenceConfig(method="vae"),
        training=TRAINING,
    )


class Disk:
    """The images on disk, of which those of one batch can be made unreadable."""

    def __init__(self, stored: StoredImages) -> None:
        self.stored = stored
        self.lost: np.ndarray | None = None

    def read(self, rows: np.ndarray) -> np.ndarray:
        if self.lost is not None and np.array_equal(rows, self.lost):
            raise UserError("the disk is gone")
        return self.stored[rows]

    def images(self) -> StoredImages:
        places = np.arange(len(self.stored))
        return StoredImages(self.read, places, SHAPE, self.stored.value_counts)


class Case(NamedTuple):
    """Images, in memory or on disk, and how to train on them."""

    config: Config
    dataset: Dataset
    trainer: Trainer
    disk: Disk | None = None

    def start(self, folder: Path, *, resume: bool = False) -> RunFolder:
        fit(self.config, self.dataset, run_dir=folder, resume=resume, options=KEPT)
        return RunFolder(folder)


@pytest.fixture(scope="module")
def resident(root, make_trainer):
    kept, dataset = config(root, stream=False), load_dataset("doodles", root)
    return Case(kept, dataset, make_trainer(untrained(kept, dataset), dataset))


@pytest.fixture(scope="module")
def streamed(root, make_trainer):
    kept, dataset = config(root, stream=True), load_dataset("doodles", root, stream=True)
    assert isinstance(dataset.train, StoredImages)
    disk = Disk(dataset.train)
    dataset = dataset._replace(train=disk.images())
    return Case(kept, dataset, make_trainer(untrained(kept, dataset), dataset), disk)


@pytest.fixture(scope="module")
def whole(resident, tmp_path_factory) -> RunFolder:
    return resident.start(tmp_path_factory.mktemp("whole") / "run")


# The images


def test_a_streamed_set_is_the_one_in_memory(root, monkeypatch):
    """Chunks may end anywhere; with equal fingerprints one run can resume the other."""
    expected = load_dataset("doodles", root)
    monkeypatch.setattr("vlae_jax.data.sets.BATCH", 7)
    found = load_dataset("doodles", root, stream=True)
    assert isinstance(found.train, StoredImages) and "streamed" in found.source
    assert (found.train.shape, found.train.dtype) == (expected.train.shape, np.uint8)
    rows = np.random.default_rng(0).permutation(len(expected.train))
    np.testing.assert_array_equal(found.train[rows], expected.train[rows])
    np.testing.assert_array_equal(found.validation, expected.validation)
    np.testing.assert_array_equal(found.test, expected.test)
    for name in ("name", "levels", "fingerprint"):
        assert getattr(found, name) == getattr(expected, name)
    np.testing.assert_array_equal(value_counts(found.train), value_counts(expected.train))
    np.testing.assert_array_equal(
        mean_image(found.train), expected.train.mean(axis=0, dtype=np.float64)
    )


def test_the_preprocessing_is_that_of_the_images_in_memory(resident, streamed):
    found, expected = (case.trainer.trained.preprocessor for case in (streamed, resident))
    chex.assert_trees_all_equal(found, expected)


class Numbered:
    """A split of any length, whose images are functions of their number; notes what is read."""

    def __init__(self, length: int, shape: tuple[int, ...] = SHAPE) -> None:
        self.length, self.shape = length, shape
        self.places: deque[int] = deque(maxlen=100)

    def __len__(self) -> int:
        return self.length

    def read(self, places: np.ndarray) -> np.ndarray:
        self.places.extend(places.tolist())
        first = (places % 256).astype(np.uint8)
        return np.broadcast_to(first[:, None, None, None], (len(places), *self.shape)).copy()

    def read_all(self) -> np.ndarray:
        return self.read(np.arange(self.length))


def peak_of_streaming(folder: Path, monkeypatch, count: int) -> int:
    """Bytes of what numpy and Python hold at most in loading and in the first steps."""
    parts = {"train": Numbered(count, (28, 28, 1)), "test": Numbered(10, (28, 28, 1))}
    (folder / "dataset_info.json").write_text(json.dumps({"name": "mine", "version": "1.0.0"}))
    for name, stand_in in (
        ("open_builder", lambda _: None),
        ("PreparedPart", lambda _, __, split, ___: parts[split]),
        ("BATCH", 100),
    ):
        monkeypatch.setattr(f"vlae_jax.data.sets.{name}", stand_in)
    tracemalloc.start()
    try:
        dataset = load_dataset("mine", folder, validation_fraction=100 / count, stream=True)
        steps = StreamedImages(dataset.train, TRAINING, Placement.here()).arguments(0)
        for _ in range(20):
            next(steps)
        steps.close()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_images_but_by_their_places(tmp_path, monkeypatch):
    peak_of_streaming(tmp_path, monkeypatch, 1_000)  # imports
    few, many = 5_000, 50_000
    few_peak, peak = (peak_of_streaming(tmp_path, monkeypatch, count) for count in (few, many))
    grown = peak - few_peak
    assert grown / (many - few) < 40, "bytes an image, which has 784 pixels"


# What a step sees


def test_a_feed_started_anywhere_gives_the_batches_of_the_order(streamed):
    feed, train = streamed.trainer.feed, streamed.dataset.train
    assert isinstance(feed, StreamedImages)
    first = int(np.random.default_rng().integers(0, 12))
    steps = feed.arguments(first)
    for step in range(first, first + 7):  # an epoch has 5
        order = epoch_order(TRAINING, step // 5, len(train))[step % 5]
        pixels, rows = feed.batch(np.int32(step), *next(steps))
        np.testing.assert_array_equal(rows, order)
        np.testing.assert_array_equal(pixels, train[order], err_msg=f"step {step} from {first}")
    steps.close()


class Shards:
    """A sharding of a batch of which this process has some rows."""

    def __init__(self, *rows: slice) -> None:
        self.rows = rows

    def addressable_devices_indices_map(self, shape):
        return {f"device {i}": (rows, slice(None)) for i, rows in enumerate(self.rows)}


def test_a_process_reads_only_its_own_rows():
    """Of two, whose devices alternate; together they read each image of an epoch once."""
    seen = []
    for own in ((slice(0, 2), slice(4, 6)), (slice(2, 4), slice(6, 8))):
        source = Numbered(41)
        places = np.random.default_rng(0).permutation(41)
        images = StoredImages(source.read, places, SHAPE, np.zeros((30, 256), np.int64))
        feed = StreamedImages(images, TRAINING, SimpleNamespace(rows=Shards(*own), put=None))
        rows = np.r_[own]
        for step in range(5, 10):
            batch, order = feed.read(step)
            np.testing.assert_array_equal(order, epoch_order(TRAINING, 1, 41)[step - 5])
            expected = places[order[rows]]
            np.testing.assert_array_equal(batch[:, 0, 0, 0], expected)
        assert len(source.places) == 5 * 4
        seen += source.places
    assert len(set(seen)) == len(seen) == 40


PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
from vlae_jax.data.stored import StoredImages
from vlae_jax.parallel.placement import Placement
from vlae_jax.runs.config import TrainingConfig
from vlae_jax.training.batches import StreamedImages, epoch_order
config, placement, places = TrainingConfig(batch_size=8, seed=2), Placement.of(), []
def read(rows):
    places.extend(rows)
    return np.broadcast_to(rows[:, None, None, None], (len(rows), 2, 3, 1)).astype(np.uint8)
images = StoredImages(read, np.arange(41), (2, 3, 1), np.zeros((6, 256), np.int64))
feed = StreamedImages(images, config, placement)
total = jax.jit(lambda step, *given: feed.batch(step, *given).pixels.astype(int).sum())
steps = feed.arguments(3)
for step in range(3, 8):
    order = epoch_order(config, step // 5, 41)[step % 5]
    batch, rows = next(steps)
    assert rows.sharding == placement.rows
    assert batch.shape == (8, 2, 3, 1) and batch.sharding == placement.rows
    assert len(batch.addressable_shards) == 2
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data)[:, 0, 0, 0], order[shard.index[0]])
    assert int(total(step, batch, rows)) == 6 * order.sum()
steps.close()
assert len(places) % 4 == 0 and len(places) <= 4 * (5 + 12)
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_of_two_devices_make_one_batch():
    import portpicker

    address = f"127.0.0.1:{portpicker.pick_unused_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in both:
            assert process.wait(120) == 0, process.stderr.read()
    finally:
        for process in both:
            process.kill()
            process.stderr.close()


# Runs


def test_a_streamed_run_is_the_run_in_memory_bit_for_bit(resident, streamed, whole, tmp_path):
    run = streamed.start(tmp_path / "run")
    assert records(run) == records(whole)
    found, expected = last_state(streamed.trainer, run), last_state(resident.trainer, whole)
    chex.assert_trees_all_equal(found, expected)


def test_a_run_that_loses_its_images_is_resumed_exactly(
    resident, streamed, whole, tmp_path, monkeypatch
):
    """A run that fails on unreadable images at any step is resumed from disk and from memory."""
    lost = int(np.random.default_rng().integers(3, 15))
    print(f"lost at step {lost}")
    order = epoch_order(TRAINING, lost // 5, len(streamed.dataset.train))[lost % 5]
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(streamed.disk, "lost", order)
        with pytest.raises(UserError, match="the disk is gone"):
            streamed.start(run.path)
    assert max(record["step"] for record in records(run)) == lost
    expected = last_state(resident.trainer, whole)
    for name, case in (("disk", streamed), ("memory", resident)):
        assert case.config.differences(run.read_config()) == []
        copy = RunFolder(shutil.copytree(run.path, tmp_path / name))
        case.start(copy.path, resume=True)
        assert records(copy) == records(whole)
        chex.assert_trees_all_equal(last_state(case.trainer, copy), expected)


# What is said


def train_refused(capfd, *arguments: object) -> str:
    return refused(capfd, "train", *arguments, "--stream")


def spoil(folder: Path, how: str) -> None:
    shard = folder / "doodles-train.array_record-00001-of-00003"
    content = bytearray(shard.read_bytes())
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        shard.write_bytes(b"")
    elif how == "flipped":
        content[len(content) // 2] ^= 255
        shard.write_bytes(content)
    elif how == "shorter":
        about = json.loads((folder / "dataset_info.json").read_text())
        about["splits"][0]["shardLengths"] = ["15", "16", "15"]
        (folder / "dataset_info.json").write_text(json.dumps(about))


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped", "shorter"])
def test_a_damaged_shard_is_one_line(tmp_path, capfd, how):
    folder = prepare(tmp_path / "data")
    spoil(folder, how)
    run = ("--dataset", "doodles", "--data-dir", tmp_path / "data", "--run-dir", tmp_path / "run")
    assert f"cannot read the train split of {folder}" in train_refused(capfd, *run)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_streamed_is_said(root, tmp_path, capfd, monkeypatch):
    np.savez(tmp_path / "doodles.npz", x_train=TRAIN, x_test=TEST)
    own = ("--dataset", "doodles", "--data-dir")
    for arguments, said in (
        ((*own, tmp_path), "download_and_prepare(file_format='array_record')"),
        ((*own, tmp_path / "doodles.npz"), "leave --stream out"),
        ((*own, root, "--preprocess", "static_binary"), "choose --preprocess dynamic_binary"),
        ((*own, root, "--method", "ppca"), "ppca is fitted to all training images at once"),
        ((*own, root, "--validation-fraction", "0.001"), "both need one or more"),
        (("--dataset", "digits"), "always in memory"),
        (("--dataset", "doodles"), "unknown data set 'doodles'"),
    ):
        assert said in train_refused(capfd, *arguments)
    monkeypatch.setattr("vlae_jax.data.search.installed", lambda module: module != "grain")
    assert "needs grain: pip install 'vlae-jax[stream]'" in train_refused(
        capfd, *own, root, "--batch-size", "8"
    )
    assert availability("doodles", root, stream=True) is Availability.NEEDS_TFDS
