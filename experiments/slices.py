"""The posterior of one image in a plane, beside Laplace, variational and skewed approximations.

.venv/bin/python -m experiments.slices RUN      (writes docs/images/posterior_slice.png)

The plane goes through the mean of the variational Gaussian, along the two directions in which
Laplace's Gaussian differs most from it. All densities are drawn as they are in that plane. The
image is, of the first ones, the one whose ELBO gains most.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, PRNGKeyArray
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import vlae_jax as vl
from experiments.report import IMAGES
from vlae_jax.commands.uses import images_of_run
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.models.saved import load
from vlae_jax.models.trained import Trained
from vlae_jax.report.style import BLUE, DPI, FAINT, INK, ORANGE, STYLE, minus
from vlae_jax.variational import variational_refine

CANDIDATES = 32
REACH, POINTS = 3.2, 121
"""Standard deviations drawn around both centers, and points a side."""
SAMPLES = 4000
"""Of each ELBO."""
LEVELS = tuple(-0.5 * radius**2 for radius in (2.45, 1.52, 0.67))
"""Log of the density over its maximum, on the ellipses that hold 95, 68 and 20 % of a Gaussian in
the plane."""


class Gaussians(NamedTuple):
    """Laplace's and the variational Gaussian of one image, with their ELBOs."""

    laplace: vl.GaussianPosterior
    refined: vl.GaussianPosterior
    bounds: Array
    """Of Laplace, of variational and of the skewed variational, nats."""


def fit(trained: Trained, pixels: Array, key: PRNGKeyArray) -> Gaussians:
    """Both Gaussians of one image."""
    inferred = trained.infer(key, pixels)
    expand, repair = inferred.at.expansions()
    start = inferred.inference.iterates[-1]
    laplace, _ = vl.infer_posterior(expand, start, num_steps=50, gradient="stop", repair=repair)
    refined, _ = variational_refine(
        expand, laplace, key, num_steps=20, num_samples=64, repair=repair, chunk_size=8
    )
    skewed = vl.SkewedPosterior(refined, jax.tree_util.Partial(inferred.log_joint))

    def bound(posterior: Any) -> Array:
        return vl.elbo(inferred.keys.bound, inferred.log_joint, posterior, num_samples=SAMPLES)

    return Gaussians(laplace, refined, jnp.stack([bound(laplace), bound(refined), bound(skewed)]))


def plane(found: Gaussians) -> Array:
    """Two directions, (2, latent), each a standard deviation of the variational Gaussian long.

    They are principal axes of Laplace's precision relative to the other's, those with the largest
    divergence along them, and point to Laplace's mean.
    """
    chol = found.refined.chol_precision
    ratio = solve_triangular(chol, found.laplace.chol_precision, lower=True)
    scales, axes = jnp.linalg.eigh(ratio @ ratio.T)
    shift = axes.T @ (chol.T @ (found.laplace.mean - found.refined.mean))
    divergence = 0.5 * (scales * (1 + shift**2) - 1 - jnp.log(scales))
    worst = jnp.argsort(-divergence)[:2]
    worst = axes[:, worst] * jnp.where(shift[worst] < 0, -1.0, 1.0)
    return solve_triangular(chol, worst, lower=True, trans=1).T


def draw(trained: Trained, images: np.ndarray, title: str) -> tuple[Figure, str]:
    """Draw the plane of the image that gains most."""
    keys = fixed_keys(len(images))
    all_found = jax.jit(jax.vmap(fit, in_axes=(None, 0, 0)))(trained.factored(), images, keys)
    gains = np.asarray(all_found.bounds[:, 1] - all_found.bounds[:, 0])
    index = int(np.nanargmax(gains))
    found = jax.tree.map(lambda leaf: leaf[index], all_found)
    inferred = trained.infer(keys[index], images[index])
    directions = plane(found)
    whitened = found.refined.chol_precision.T
    center = (directions @ whitened.T) @ (whitened @ (found.laplace.mean - found.refined.mean))
    sides = [jnp.linspace(-REACH, REACH + along, POINTS) for along in center]
    offsets = jnp.stack(jnp.meshgrid(*sides), axis=-1).reshape(-1, 2)
    points = found.refined.mean + offsets @ directions
    skewed = vl.SkewedPosterior(found.refined, jax.tree_util.Partial(inferred.log_joint))

    def heights(log_density: Callable[[Array], Array]) -> np.ndarray:
        values = np.asarray(jax.lax.map(log_density, points, batch_size=500))
        return (values - values.max()).reshape(POINTS, POINTS)

    truth = heights(inferred.log_joint)
    shown = (
        ("Laplace", found.laplace.log_prob, ORANGE),
        ("variational", found.refined.log_prob, BLUE),
        ("skewed variational", skewed.log_prob, BLUE),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.3), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 3, sharex=True, sharey=True)
        for axes, (label, log_density, color), bound in zip(
            panels, shown, found.bounds, strict=True
        ):
            axes.contourf(*sides, truth, [*LEVELS, 0.0], colors=["#eceff3", "#d5dbe3", "#b9c2cf"])
            axes.contour(*sides, truth, LEVELS, colors=INK, linewidths=0.6, linestyles="solid")
            axes.contour(*sides, heights(log_density), LEVELS, colors=color, linestyles="solid")
            axes.set_title(f"{label}: ELBO {minus(f'{float(bound):.2f}')}", loc="left")
            axes.set_aspect("equal")
            axes.tick_params(labelsize=8)
        panels[0].set_ylabel("second direction, standard deviations")
        figure.supxlabel(
            "direction of the largest error, standard deviations", fontsize=9, color=FAINT
        )
        figure.suptitle(title, x=0.01, ha="left")
    return figure, f"image {index}: ELBO {[round(float(b), 2) for b in found.bounds]}"


def main() -> None:
    """Draw the picture of a run."""
    parser = argparse.ArgumentParser(prog="python -m experiments.slices", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--data-dir", help="folder of its images, if they have moved")
    parser.add_argument("--output", type=Path, default=IMAGES / "posterior_slice.png")
    given = parser.parse_args()
    trained = load(given.run)
    images = images_of_run(trained, given.data_dir, "name the folder of its images").test
    made_from = trained.provenance
    label = trained.config.inference.label
    title = f"The posterior of one {made_from.dataset} image under a {label}’s decoder (gray)"
    figure, words = draw(trained, images[:CANDIDATES], title)
    figure.savefig(given.output, metadata={"Software": None})
    print(f"{given.output}: {words}")


if __name__ == "__main__":
    main()
