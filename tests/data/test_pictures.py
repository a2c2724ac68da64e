"""Folders of pictures as data sets, and as input of a trained model."""

import dataclasses

import numpy as np
import pytest
from builders import tiny_config
from PIL import Image

from vlae_jax.commands.main import main
from vlae_jax.data.sets import load_dataset
from vlae_jax.data.supplied import as_dataset, read_images
from vlae_jax.errors import UserError
from vlae_jax.runs.config import DataConfig

SHAPE = (6, 4)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def gray(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def rows(*parts):
    return {image.tobytes() for part in parts for image in part}


@pytest.fixture
def animals(tmp_path):
    """Twenty gray pictures in two folders of classes, one of them in another folder."""
    for i in range(20):
        kind = "cats" if i % 2 else "others/dogs"
        save(tmp_path / "animals" / kind / f"{i}.png", gray(i))
    save(tmp_path / "animals" / ".thumbnails" / "0.png", gray(99))
    (tmp_path / "animals" / "README.txt").write_text("no picture")
    return tmp_path


def test_folders_of_classes_are_one_data_set(animals):
    """Of a folder that is named, or that holds a folder of that name; a fifth is for the test."""
    found = load_dataset("animals", animals)
    assert found.train.shape[1:] == (*SHAPE, 1)
    assert [len(part) for part in found[1:4]] == [14, 2, 4]
    assert rows(*found[1:4]) == {gray(i).tobytes() for i in range(20)}
    inside = load_dataset("pets", animals / "animals")
    assert inside.fingerprint == found.fingerprint and "pictures in" in found.source
    # What lies there must not stand in for a set that everyone knows.
    with pytest.raises(UserError, match="no mnist in data_dir"):
        load_dataset("mnist", animals / "animals")


def test_folders_named_train_and_test_are_the_parts(tmp_path):
    for i in range(12):
        save(tmp_path / ("train/a" if i < 9 else "test") / f"{i}.png", gray(i))
    found = load_dataset("mine", tmp_path)
    assert rows(found.test) == {gray(i).tobytes() for i in range(9, 12)}
    assert rows(found.train, found.validation) == {gray(i).tobytes() for i in range(9)}


def test_one_picture_in_color_makes_all_of_them_so(animals):
    save(animals / "animals" / "cats" / "z.png", gray(50, (*SHAPE, 3)))
    found = load_dataset("animals", animals)
    assert found.train.shape[1:] == (*SHAPE, 3)
    assert np.repeat(gray(3)[..., None], 3, axis=2).tobytes() in rows(*found[1:4])


def test_pictures_of_several_sizes_are_brought_to_one(tmp_path):
    """Scaled to cover it with their own aspect ratio, the middle kept; one that fits is unchanged.

    A picture twice as wide as it is high has a dark left, a bright middle and a dark right.
    """
    wide = np.zeros((40, 80), np.uint8)
    wide[:, 14:66] = 200
    save(tmp_path / "a.png", wide)
    for i in range(7):
        save(tmp_path / f"b{i}.png", gray(i, (20, 20)))
    with pytest.raises(UserError, match=r"b0.png has 20 x 20 .*a.png has 40 x 80; --resize"):
        load_dataset("mine", tmp_path)
    found = load_dataset("mine", tmp_path, resize=(20, 20))
    images = np.concatenate(found[1:4])
    assert images.shape == (8, 20, 20, 1)
    (middle,) = [image for image in images if np.ptp(image) < 60]
    assert np.median(middle) == 200
    assert gray(0, (20, 20)).tobytes() in rows(images)


def test_resizing_is_for_pictures_alone(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=gray(0, (9, 4, 4)), x_test=gray(1, (9, 4, 4)))
    with pytest.raises(UserError, match="--resize is for folders of pictures"):
        load_dataset("mine", tmp_path, resize=(4, 4))
    with pytest.raises(UserError, match="--resize is for folders of pictures"):
        load_dataset("digits", resize=(4, 4))
    with pytest.raises(UserError, match="resize is for folders of pictures"):
        as_dataset(gray(0, (9, 4, 4)), DataConfig(resize=(4, 4)))
    with pytest.raises(UserError, match="at least 1"):
        DataConfig(resize=(0, 4))


def test_what_is_no_opaque_picture_of_8_bits_is_named_before_training(animals, capfd):
    path = animals / "animals" / "cats" / "deep.png"
    Image.fromarray(np.full(SHAPE, 1000, np.uint16)).save(path)
    arguments = ["train", "--dataset", "animals", "--data-dir", str(animals)]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--run-dir", str(animals / "run")])
    said = capfd.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(said) == 1 and "deep.png has not 8 bits" in said[0]
    assert not (animals / "run").exists()
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"deep.png cannot be read as a picture"):
        load_dataset("animals", animals)


def test_input_is_found_in_folders_and_resized_as_the_training_was(animals):
    found = read_images(animals / "animals", (*SHAPE, 1), 256)
    assert len(found.pixels) == 20
    assert found.names[0] == "cats/1.png" and "others/dogs/18.png" in found.names
    save(animals / "big.png", gray(7, (60, 40)))
    with pytest.raises(UserError, match="shape 6 x 4 x 1"):
        read_images(animals / "big.png", (*SHAPE, 1), 256)
    assert read_images(animals / "big.png", (*SHAPE, 1), 256, resize=SHAPE).pixels.shape[0] == 1


@pytest.mark.slow
def test_a_model_of_pictures_is_trained_and_used(animals, capfd):
    run = animals / "run"
    small = ["--hidden", "8", "--latent", "2", "--batch-size", "4", "--epochs", "1", "--method"]
    cheap = ["--importance-samples", "20", "--proposal", "posterior"]
    named = ["--dataset", "animals", "--data-dir", str(animals), "--resize", "8", "8"]
    main(["train", *named, *small, "vae", *cheap, "--run-dir", str(run)])
    main(["encode", str(run), str(animals / "animals" / "cats")])
    with np.load(run / "encoded.npz") as codes:
        assert codes["mean"].shape == (10, 2) and codes["names"][0] == "1.png"
    capfd.readouterr()


def test_the_size_is_part_of_the_configuration():
    data = DataConfig(resize=(8, 8))
    config = dataclasses.replace(tiny_config(), data=data)
    assert config.differences(dataclasses.replace(config, data=DataConfig())) != []
