"""Pictures, masks and arrays of the user: read as every viewer shows them, or refused."""

import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from vlae_jax.data.preprocessing import fit_preprocessor
from vlae_jax.data.sets import dataset_from_arrays, load_dataset
from vlae_jax.data.supplied import read_images, read_missing
from vlae_jax.errors import UserError

GRAY, COLOR = (6, 4, 1), (6, 4, 3)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, GRAY[:2], np.uint8)


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, lambda x: x),
        (3, lambda x: x[::-1, ::-1]),
        (4, np.flipud),
        (6, lambda x: np.rot90(x, -1)),
    ],
)
def test_a_picture_is_turned_as_its_orientation_says(tmp_path, pixels, orientation, shown):
    """The meaning of the orientation is that of the EXIF standard, written out here."""
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(tmp_path / "one.png", exif=exif)
    expected = shown(pixels)
    found = read_images(tmp_path / "one.png", (*expected.shape, 1), 256).pixels
    np.testing.assert_array_equal(found[0, ..., 0], expected)


@pytest.mark.parametrize("ending", ["tiff", "gif", "webp", "png"])
def test_several_pictures_in_one_file_are_refused(tmp_path, pixels, ending):
    path = tmp_path / f"three.{ending}"
    pages = [Image.fromarray(np.roll(pixels, shift, axis=0)) for shift in (0, 1, 2)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match="holds 3 pictures; save each"):
        read_images(path, GRAY, 256)


def deep_png(color_type):
    """A PNG of 16 bits a channel, written chunk by chunk."""

    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    channels = {0: 1, 2: 3, 6: 4}[color_type]
    size = np.array([4, 6], ">u4").tobytes()
    rows = b"".join(b"\0" + bytes(range(8 * channels)) for _ in range(6))
    head = chunk(b"IHDR", size + bytes([16, color_type, 0, 0, 0]))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(("color_type", "shape"), [(0, GRAY), (2, COLOR), (6, COLOR)])
def test_sixteen_bits_a_channel_are_refused(tmp_path, color_type, shape):
    path = tmp_path / "deep.png"
    path.write_bytes(deep_png(color_type))
    with pytest.raises(UserError, match="has not 8 bits a channel"):
        read_images(path, shape, 256)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_mask_in_a_picture_is_what_is_nearer_to_white(tmp_path, ending):
    """Also where lossy compression leaves neither black nor white."""
    hidden = np.zeros((32, 32), bool)
    hidden[9:23, 5:18] = True
    path = tmp_path / f"mask.{ending}"
    Image.fromarray(np.where(hidden, 255, 0).astype(np.uint8)).save(path, quality=80)
    with Image.open(path) as picture:
        is_lossy = len(np.unique(np.asarray(picture.convert("L")))) > 2
    assert is_lossy == (ending != "png")
    missing = read_missing(path, (32, 32, 1), 1)
    np.testing.assert_array_equal(missing[0, ..., 0], hidden)


def test_a_mask_that_is_black_throughout_is_refused_with_its_values(tmp_path):
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"pixels from 128 to 255 .* its values are 0 to 1"):
        read_missing(tmp_path / "mask.png", (4, 4, 1), 1)
    np.save(tmp_path / "mask.npy", np.eye(4, dtype=np.uint8))
    assert read_missing(tmp_path / "mask.npy", (4, 4, 1), 1).sum() == 4


@pytest.mark.parametrize("levels", [2, 16])
def test_the_scale_of_pixels_is_asked_about_where_it_is_in_doubt(tmp_path, levels):
    """And what is told is believed: black and white as 0 and 1 are then black and white."""
    pixels = np.random.default_rng(0).integers(0, levels, (40, 4, 3), np.uint8)
    assert pixels.max() == levels - 1
    np.savez(tmp_path / "mine.npz", x_train=pixels, x_test=pixels[:5])
    with pytest.raises(UserError, match=rf"from 0 to {levels - 1}, .* --levels {levels}, or"):
        load_dataset("mine", tmp_path)
    with pytest.raises(UserError, match=rf"unlikely for 256 levels.*levels {levels}"):
        dataset_from_arrays(pixels)
    dataset = load_dataset("mine", tmp_path, levels=levels)
    assert dataset.levels == levels
    binary = fit_preprocessor(dataset.train, kind="static_binary", levels=levels)
    x, _ = binary.apply(jax.random.key(0), np.full((4, 3, 1), levels - 1, np.uint8))
    np.testing.assert_array_equal(x, 1.0)
    with pytest.raises(UserError, match=rf"below levels={levels - 1}, got {levels - 1}"):
        load_dataset("mine", tmp_path, levels=levels - 1)
    assert load_dataset("mine", tmp_path, levels=256).levels == 256


def test_told_levels_are_checked_for_digits_too():
    assert load_dataset("digits", levels=17).levels == 17
    with pytest.raises(UserError, match="must lie below levels=16, got 16"):
        load_dataset("digits", levels=16)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((40, 3, 8, 8), "its channels first"),
        ((40, 1, 8, 8), "its channels first"),
        ((40, 8, 8, 2), "1 channel or 3, got 2"),
        ((40, 8, 8, 4), "1 channel or 3, got 4"),
    ],
)
def test_channels_that_no_report_can_show_are_refused_at_the_door(shape, words):
    with pytest.raises(UserError, match=words):
        dataset_from_arrays(np.zeros(shape, np.uint8))
