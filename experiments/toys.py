"""The mode search drawn in data space, for one latent and two data dimensions.

.venv/bin/python -m experiments.toys      (writes docs/images/toys.png)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from jaxtyping import PRNGKeyArray
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import vlae_jax as vl
from experiments.report import IMAGES
from vlae_jax.models.linear import fit_ppca
from vlae_jax.report.style import BLUE, DPI, FAINT, INK, ORANGE, STYLE

POINTS, STEPS, HIDDEN = 600, 4, 24
STD = 0.12


def line(rng: np.random.Generator) -> np.ndarray:
    """Points about a line: probabilistic PCA is the true model."""
    z = rng.normal(size=(POINTS, 1))
    return z @ np.array([[1.2, 0.7]]) + 0.25 * rng.normal(size=(POINTS, 2))


def arc(rng: np.random.Generator) -> np.ndarray:
    """Points about three quarters of a circle, which no line follows."""
    angle = 0.75 * np.pi * np.tanh(0.8 * rng.normal(size=POINTS)) / np.tanh(1.6) + 0.5 * np.pi
    circle = 1.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return circle + STD * rng.normal(size=(POINTS, 2))


def decode(params: Any, z: jax.Array) -> jax.Array:
    """A ReLU network of one hidden layer, or an affine map where there is none."""
    for kernel, bias in params["hidden"]:
        z = jax.nn.relu(z @ kernel + bias)
    kernel, bias = params["head"]
    return z @ kernel + bias


def expansion(params: Any, x: jax.Array) -> vl.Expansion:
    """Second-order expansion of log p(x, z); exact, for the decoder is piecewise linear."""
    return vl.gauss_newton_expansion(
        lambda z: decode(params, z), lambda mean: vl.gaussian(x, mean, params["log_var"])
    )


def train(xs: jax.Array, key: jax.Array) -> Any:
    """Train the ReLU model by the ELBO of the Laplace posterior, with several first guesses."""
    first, second = jax.random.split(key)
    params = {
        "hidden": [(jax.random.normal(first, (1, HIDDEN)), jnp.linspace(-2, 2, HIDDEN))],
        "head": (0.3 * jax.random.normal(second, (HIDDEN, 2)), jnp.mean(xs, axis=0)),
        "log_var": jnp.log(0.5),
    }
    guesses = jnp.linspace(-2, 2, 9)[:, None]

    def loss(params: Any, key: PRNGKeyArray) -> Array:
        def bound(x: Array, key: PRNGKeyArray) -> Array:
            expand = expansion(params, x)
            start = guesses[jnp.argmax(jax.vmap(lambda z: expand(z).value)(guesses))]
            posterior, _ = vl.infer_posterior(expand, start, num_steps=STEPS)
            return vl.elbo(key, lambda z: expand(z).value, posterior)

        return -jnp.mean(jax.vmap(bound)(xs, jax.random.split(key, len(xs))))

    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 1500))

    def step(carry: Any, key: PRNGKeyArray) -> tuple[Any, None]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(key, 1500)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys))
    (params, _), losses = run(params)
    print(f"ReLU model: ELBO {-losses[-50:].mean():.3f} nats a point after 1500 steps")
    return params


def draw(
    axes: Axes,
    xs: np.ndarray,
    params: Any,
    title: str,
    offsets: Sequence[float],
    asides: Sequence[float] = (0.0, 0.0, 0.0),
) -> None:
    """Draw data, decoder, and the searches of a few points from poor first guesses.

    Searches on a straight line would hide each other, so each is drawn `aside` of it, upwards.
    """
    zs = jnp.linspace(-2.8, 2.8, 400)[:, None]
    curve = jax.vmap(lambda z: decode(params, z))(zs)
    axes.scatter(xs[:, 0], xs[:, 1], s=3, color="#cccccc", linewidths=0)
    axes.plot(*curve.T, color=INK, linewidth=1.3, label="decoder g(z)")
    for index, (offset, aside) in enumerate(zip(offsets, asides, strict=True)):
        x = jnp.asarray(xs[index])
        expand = expansion(params, x)
        best = zs[jnp.argmax(jax.vmap(lambda z, expand=expand: expand(z).value)(zs))]
        mode, info = vl.newton_refine(expand, best + offset, num_steps=STEPS)
        iterates = jax.vmap(lambda z: decode(params, z))(info.iterates) + jnp.array([0.0, aside])
        posterior = vl.laplace_posterior(expand, mode)
        std = jnp.sqrt(posterior.covariance()[0])
        likely = jax.vmap(lambda z: decode(params, z))(
            mode + std * jnp.linspace(-2, 2, 50)[:, None]
        )
        first = index == 0
        axes.plot(
            *likely.T,
            color=BLUE,
            linewidth=4,
            alpha=0.45,
            solid_capstyle="round",
            label="posterior, ± 2 standard deviations" if first else None,
        )
        axes.plot(
            *iterates.T,
            "o-",
            color=ORANGE,
            markersize=3.5,
            linewidth=0.9,
            label=f"search, {STEPS} steps" if first else None,
        )
        axes.plot(
            *iterates[0],
            "o",
            markersize=7,
            markerfacecolor="none",
            color=ORANGE,
            label="first guess" if first else None,
        )
        axes.plot(*jnp.stack([iterates[-1], x]).T, ":", color=FAINT, linewidth=1.2)
        axes.plot(*x, "x", color=INK, markersize=6, label="observed x" if first else None)
    axes.set_title(title, loc="left", fontsize=9.5)
    axes.set_aspect("equal")
    axes.grid(visible=False)


def main(folder: Path = IMAGES) -> None:
    """Fit both models and draw them."""
    rng = np.random.default_rng(0)
    straight, bent = line(rng), arc(rng)
    fitted = fit_ppca(straight, 1)
    linear = {
        "hidden": [],
        "head": (jnp.asarray(fitted.kernel), jnp.asarray(fitted.bias)),
        "log_var": jnp.log(fitted.variance[0]),
    }
    relu = train(jnp.asarray(bent), jax.random.key(0))
    # The first points are those whose searches are drawn, so they lie far apart.
    straight = np.concatenate([spread(straight, straight[:, 0]), straight])
    bent = np.concatenate([spread(bent, np.arctan2(bent[:, 1], bent[:, 0])), bent])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 4.2), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        draw(
            left,
            straight,
            linear,
            "Probabilistic PCA: one step is exact (paths drawn aside)",
            (1.6, 1.4, -1.3),
            (0.35, -0.35, 0.35),
        )
        draw(right, bent, relu, "ReLU decoder", (0.55, -0.6, -0.55))
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "toys.png", metadata={"Software": None})


def spread(xs: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Points at the 12th, 50th and 88th percentile of a coordinate."""
    order = np.argsort(along)
    return xs[order[[int(share * len(xs)) for share in (0.12, 0.5, 0.88)]]]


if __name__ == "__main__":
    main()
