"""Arrays for the pictures of the report, computed from a trained model."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.models.trained import Trained
from vlae_jax.parallel.mapping import map_images
from vlae_jax.posterior import mean_and_covariance

_SHOWN_IMAGES = 10
_SEARCHED_IMAGES = 250
_PRIOR_SAMPLES = 64
_MOMENT_SAMPLES = 2000
_INTERPOLATIONS, _INTERPOLATION_STEPS = 6, 9


def take_snapshots(trained: Trained, images: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the arrays for the report's pictures of a model, from the first of the images.

    Of a table there are no pictures of examples: for rows in their own units rows (m, dim) and
    row_reconstructions (m, dim), at the center of the posterior, and row_means (m, latent), with
    columns, their names; and covariances, step_log_joint and step_error as below.

    Args:
        trained: The model.
        images: uint8, (n, height, width, channel), or measurements (n, ...); usually the test
            images.

    Returns:
        For the first few images, in [0, 1] (measurements by the range that is shown): data
        (n, h, w, c), and reconstructions (n, steps + 1, h, w, c) from each point of the mode
        search; covariances (n, latent, latent) of their posteriors. For a larger number m of
        images: step_log_joint (m, steps + 1), nats, and step_error (m, steps + 1), the root mean
        squared error of the reconstruction in model space. Expected images: prior_samples
        (k, h, w, c), and
        interpolations (pairs, points, h, w, c) on the line between two images' posterior means.
    """
    images = images[:_SEARCHED_IMAGES]
    trained = trained.for_examples(images)
    is_table = trained.preprocessor.is_table
    to_pixels = trained.preprocessor.to_pixels

    def search(trained: Trained, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        inferred = trained.infer(key, pixels)
        iterates = inferred.inference.iterates
        decoded = jax.vmap(inferred.at.model.reconstruct)(iterates)
        residuals, observed = decoded - inferred.x, inferred.at.observed
        found = {
            "step_log_joint": jax.vmap(inferred.log_joint)(iterates),
            "step_error": jnp.sqrt(jnp.mean(residuals**2, axis=1, where=observed)),
        }
        if is_table:
            found["rows"] = to_pixels(inferred.x)
            found["row_reconstructions"] = to_pixels(decoded[-1])
            found["row_means"] = iterates[-1]
        return found

    def look(trained: Trained, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        inferred = trained.infer(key, pixels)
        mean, covariance = mean_and_covariance(
            inferred.keys.divergence, inferred.posterior, num_samples=_MOMENT_SAMPLES
        )
        model = inferred.at.model
        decoded = jax.vmap(lambda z: to_pixels(model.reconstruct(z)))(inferred.inference.iterates)
        return {
            "data": to_pixels(inferred.x),
            "reconstructions": decoded,
            "covariances": covariance,
            "means": mean,
        }

    keys = fixed_keys(len(images))
    searched = map_images(search, images, keys, batch_size=_SHOWN_IMAGES)(trained)
    shown = images[: max(_SHOWN_IMAGES, 2 * _INTERPOLATIONS)]
    looks = map_images(look, shown, keys[: len(shown)], batch_size=_SHOWN_IMAGES)(trained)
    means = looks.pop("means")
    if is_table:
        names = trained.provenance.columns or range(trained.preprocessor.dim)
        columns = np.array([str(name) for name in names])
        return {**searched, "covariances": looks["covariances"][:_SHOWN_IMAGES], "columns": columns}

    @jax.jit
    def decode_all(trained: Trained, zs: Array) -> Array:
        model = trained.model
        return jax.vmap(lambda z: to_pixels(model.reconstruct(z)))(zs)

    key = jax.random.key(trained.config.training.seed)
    keys = jax.random.split(key, _PRIOR_SAMPLES)
    prior = jax.vmap(trained.model.prior.draw)(keys)
    pairs = len(means) // 2
    weights = np.linspace(0, 1, _INTERPOLATION_STEPS)[:, None]
    lines = (1 - weights) * means[:pairs, None] + weights * means[pairs : 2 * pairs, None]
    between = decode_all(trained, lines.reshape(-1, means.shape[1]))
    found = {
        **searched,
        **{name: values[:_SHOWN_IMAGES] for name, values in looks.items()},
        "prior_samples": np.asarray(decode_all(trained, prior)),
        "interpolations": np.asarray(between).reshape(*lines.shape[:2], *between.shape[1:]),
    }
    return found if trained.provenance.levels else _as_pictures(found)


def _as_pictures(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Images of measurements as gray or color pictures in [0, 1], by the range of the data shown.

    Of images with 2 or more than 3 channels the first is shown; a missing entry is 0.
    """
    low, high = np.nanmin(found["data"]), np.nanmax(found["data"])
    pictures = {}
    for name in ("data", "reconstructions", "prior_samples", "interpolations"):
        array = found[name] if found[name].shape[-1] in (1, 3) else found[name][..., :1]
        scaled = np.nan_to_num((array - low) / (high - low) if high > low else array - low)
        pictures[name] = np.clip(scaled, 0, 1)
    return {**found, **pictures}
