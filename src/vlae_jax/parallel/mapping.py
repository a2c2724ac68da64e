"""Applying a function of one image to a set of images, in batches of one shape."""

import functools
from collections.abc import Callable, Hashable, Mapping
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
    options: Mapping[str, Hashable] | None = None,
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
        options: Keyword arguments of `function`, which must then be a module's own. On one device
            what is compiled is kept for later calls, also with other numbers of images: batches are
            then as large as the next power of two.

    Returns:
        (params, on_batch, num_batches) → the pytree with numpy leaves of n rows, or fewer if only
        the first batches are asked for. `on_batch(done)`, if given, is called with the number of
        images finished.
    """
    n = len(images)
    is_kept = options is not None and placement is None
    batch_size = min(batch_size, 1 << (n - 1).bit_length() if is_kept else n)
    if placement:
        batch_size += -batch_size % placement.mesh.shape[DATA]
    starts = range(0, n, batch_size)
    rows = np.minimum(np.arange(len(starts) * batch_size), n - 1).reshape(-1, batch_size)
    if is_kept:
        assert options is not None
        compiled = _kept(function, tuple(sorted(options.items())))
    else:
        compiled = _compile(functools.partial(function, **(options or {})), placement)

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


def _compile(function: Callable[..., Any], placement: Placement | None) -> Callable[..., Any]:
    def batch(params: Any, *items: Any) -> Any:
        return jax.vmap(lambda *row: function(params, *row))(*items)

    return jax.jit(batch, out_shardings=placement and placement.replicated)


@functools.lru_cache(maxsize=32)
def _kept(
    function: Callable[..., Any], options: tuple[tuple[str, Hashable], ...]
) -> Callable[..., Any]:
    return _compile(functools.partial(function, **dict(options)), None)
