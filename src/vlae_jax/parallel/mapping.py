"""Applying a function of one image to a set of images, in batches of one shape."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vlae_jax.parallel.placement import DATA, Placement


def map_images(
    function: Callable[..., Any],
    images: np.ndarray,
    *arrays: Any,
    batch_size: int,
    placement: Placement | None = None,
) -> Callable[..., Any]:
    """Prepare to apply a one-image function to every image of a set, in batches of one shape.

    The last batch is filled up with repeated images, whose results are dropped: every image
    counts once, whatever the batch size.

    Args:
        function: (params, pixels, *items) → any pytree of arrays; traced once.
        images: (n, height, width, channel).
        arrays: More arrays with n rows, one row given to each call (keys, say).
        batch_size: Images at once; rounded up so that every device gets as many.
        placement: Split each batch along `data`, with parameters that are placed already; every
            process must then call this, and gets all results. By default one device does all.

    Returns:
        (params, on_batch, num_batches) → the pytree with numpy leaves of n rows, or fewer if only
        the first batches are asked for. `on_batch(done)`, if given, is called with the number of
        images finished.
    """
    n = len(images)
    batch_size = min(batch_size, n)
    if placement:
        batch_size += -batch_size % placement.mesh.shape[DATA]
    starts = range(0, n, batch_size)
    rows = np.minimum(np.arange(len(starts) * batch_size), n - 1).reshape(-1, batch_size)
    compiled = jax.jit(
        jax.vmap(function, in_axes=(None,) + (0,) * (1 + len(arrays))),
        out_shardings=placement and placement.replicated,
    )

    def run(
        params: Any,
        on_batch: Callable[[int], None] | None = None,
        num_batches: int | None = None,
    ) -> Any:
        results = []
        for start, row in zip(starts[:num_batches], rows[:num_batches], strict=True):
            items = (images[row], *(array[row] for array in arrays))
            if placement:
                items = placement.put(items, placement.rows)
            batch = compiled(params, *items)
            results.append(jax.device_get(batch))
            if on_batch:
                on_batch(min(start + batch_size, n))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *results)

    return run
