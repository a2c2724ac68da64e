"""A function of one image over a set, in batches of one shape."""

import numpy as np

from vlae_jax.parallel.mapping import map_images


def test_map_images_counts_every_image_once_whatever_the_batch():
    images = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
    for batch_size in (1, 3, 7, 100):
        total = map_images(
            lambda scale, image, offset: scale * image.sum() + offset,
            images,
            np.arange(7),
            batch_size=batch_size,
        )
        expected = 2 * images.reshape(7, -1).sum(1) + np.arange(7)
        np.testing.assert_array_equal(total(2), expected)
