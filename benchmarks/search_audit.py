"""How often a mode search says "converged" where it has not: random log joints of several kinds.

    python -m benchmarks.search_audit

Each example is searched by `newton_refine`; where that says `converged`, scipy's exact trust region
goes on from there in float64, in posterior standard deviations and in short steps, so that it
climbs the same hill. A flag is false where scipy gains more than 0.05 nats, five times what the
flag promises.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import Array

import vlae_jax as vl
from vlae_jax.refinement import Damping

FALSE = 0.05
"""Nats that scipy must gain for a flag to be called false."""
SLOPE = 1e-3
"""Nats a standard deviation at which scipy is content."""
LATENT = 3


class Kind(NamedTuple):
    """Random log joints of one kind."""

    draw: Callable[[np.random.Generator, int], dict[str, np.ndarray]]
    """(rng, count) → parameters with a leading axis, `z_init` among them."""
    log_joint: Callable[[dict[str, Any], Any], Any]
    """(parameters of one example, z) → nats."""


def _draw_heavy_tails(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Few observations with few degrees of freedom, in units from 1e-4 to 1e4."""
    unit = 10 ** rng.uniform(-4, 4, (count, 1))
    return {
        "unit": unit,
        "kernel": rng.normal(size=(count, LATENT, 5)),
        "x": 10 * rng.standard_t(1, size=(count, 5)),
        "freedom": rng.uniform(0.3, 5, count),
        "z_init": unit * rng.normal(size=(count, LATENT)) * 10 ** rng.uniform(-1, 2, (count, 1)),
    }


def _heavy_tails(p: Any, z: Array) -> Array:
    scaled = z / p["unit"]
    prior = vl.gaussian(scaled, jnp.zeros_like(scaled), jnp.full_like(scaled, 6.0))
    return vl.student_t(p["x"], scaled @ p["kernel"], jnp.zeros_like(p["x"]), p["freedom"]) + prior


def _draw_scales(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Coordinates that differ by up to eight orders of magnitude, seen through a smooth bend."""
    unit = 10 ** rng.uniform(-4, 4, (count, LATENT))
    return {
        "unit": unit,
        "kernel": rng.normal(size=(count, LATENT, 5)),
        "x": 2 * rng.normal(size=(count, 5)),
        "log_var": rng.uniform(-7, 1, (count, 1)),
        "z_init": unit * 3 * rng.normal(size=(count, LATENT)),
    }


def _scales(p: Any, z: Array) -> Array:
    scaled = z / p["unit"]
    mean = 2 * jnp.tanh(scaled @ p["kernel"])
    return vl.gaussian(p["x"], mean, jnp.broadcast_to(p["log_var"], mean.shape)) + (
        vl.standard_normal(scaled)
    )


def _draw_saddles(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Double wells, searched from the saddle between them or from very near it."""
    basis = np.linalg.qr(rng.normal(size=(count, LATENT, LATENT)))[0]
    size = 10 ** rng.uniform(-2, 2, (count, 1))
    offset = np.where(rng.random((count, 1)) < 0.3, 0.0, 10 ** rng.uniform(-8, -1, (count, 1)))
    return {
        "basis": basis,
        "height": 10 ** rng.uniform(-1, 3, (count, LATENT)),
        "size": size,
        "z_init": size * offset * rng.normal(size=(count, LATENT)),
    }


def _saddles(p: Any, z: Array) -> Array:
    along = p["basis"] @ (z / p["size"])
    # A well, a hill that falls off at last, and a plain square.
    return -(p["height"] @ jnp.stack([(along[0] ** 2 - 1) ** 2, along[1] ** 2, along[2] ** 4]))


def _draw_funnels(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Neal's funnel with two numbers observed."""
    return {
        "x": rng.normal(size=(count, 2)) * np.exp(rng.normal(size=(count, 1))),
        "log_var": rng.uniform(-6, 2, (count, 1)),
        "z_init": rng.normal(size=(count, LATENT)) * 10 ** rng.uniform(-1, 0.7, (count, 1)),
    }


def _funnels(p: Any, z: Array) -> Array:
    zeros = jnp.zeros_like(z[1:])
    prior = vl.gaussian(z[:1], zeros[:1], jnp.full_like(z[:1], 2 * np.log(3.0)))
    neck = vl.gaussian(z[1:], zeros, jnp.broadcast_to(z[0], zeros.shape))
    return prior + neck + vl.gaussian(p["x"], z[1:], jnp.broadcast_to(p["log_var"], zeros.shape))


def _draw_relu(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Two layers of ReLUs, weak to violent weights, and a Gaussian output."""
    weight = np.exp(rng.uniform(-1, 1.5, (count, 1, 1)))
    return {
        "first": weight * rng.normal(size=(count, LATENT, 8)),
        "second": weight * rng.normal(size=(count, 8, 6)),
        "x": 3 * rng.normal(size=(count, 6)),
        "log_var": rng.uniform(-5, 0, (count, 1)),
        "z_init": 2 * rng.normal(size=(count, LATENT)),
    }


def _relu(p: Any, z: Array) -> Array:
    mean = jax.nn.relu(z @ p["first"]) @ p["second"]
    return vl.gaussian(p["x"], mean, jnp.broadcast_to(p["log_var"], mean.shape)) + (
        vl.standard_normal(z)
    )


def _draw_mean_and_log_sd(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Three numbers of a Gaussian with both parameters unknown."""
    spread = 10 ** rng.uniform(-3, 1.5, (count, 1))
    return {
        "x": rng.normal(size=(count, 1)) * 3 + spread * rng.normal(size=(count, 3)),
        "z_init": np.zeros((count, 2)),
    }


def _mean_and_log_sd(p: Any, z: Array) -> Array:
    mean = jnp.broadcast_to(z[0], p["x"].shape)
    return vl.gaussian(p["x"], mean, jnp.broadcast_to(2 * z[1], mean.shape)) + vl.standard_normal(z)


def _draw_counts(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Poisson counts, up to thousands where the first guess expects one."""
    rate = 10 ** rng.uniform(-1, 4, (count, 6))
    return {
        "kernel": rng.normal(size=(count, LATENT, 6)),
        "x": rng.poisson(rate).astype(float),
        "z_init": 3 * rng.normal(size=(count, LATENT)),
    }


def _counts(p: Any, z: Array) -> Array:
    return vl.poisson(p["x"], z @ p["kernel"]) + vl.standard_normal(z)


KINDS = {
    "heavy tails": Kind(_draw_heavy_tails, _heavy_tails),
    "scales": Kind(_draw_scales, _scales),
    "saddles": Kind(_draw_saddles, _saddles),
    "funnels": Kind(_draw_funnels, _funnels),
    "ReLU networks": Kind(_draw_relu, _relu),
    "mean and log sd": Kind(_draw_mean_and_log_sd, _mean_and_log_sd),
    "counts": Kind(_draw_counts, _counts),
}


class Finding(NamedTuple):
    """Of one kind, one dtype and one damping."""

    searches: int
    converged: int
    kinks: int
    false: int
    worst: float
    """Most that scipy gained where the search said converged, nats."""
    fell: int
    """Searches whose log joint fell by more than its rounding."""


def audit(
    name: str,
    *,
    count: int,
    seed: int,
    dtype: Any,
    damping: Damping,
    num_steps: int,
    batch: int = 1000,
) -> Finding:
    """Search `count` random log joints of one kind, and hold the flags to scipy's findings."""
    kind = KINDS[name]
    rng = np.random.default_rng([seed, list(KINDS).index(name)])

    @jax.jit
    @jax.vmap
    def search(p: Any, key: Array) -> Any:
        log_joint = functools.partial(kind.log_joint, p)
        posterior, info = vl.infer_posterior(
            vl.exact_expansion(log_joint), p["z_init"], num_steps=num_steps, damping=damping
        )
        return posterior, vl.certify_kink(key, log_joint, posterior, info)

    def lost(p: Any, mode: Array, chol: Array, u: Array) -> Array:
        return -kind.log_joint(p, mode + jax.scipy.linalg.solve_triangular(chol.T, u))

    @jax.jit
    def climb(*point: Any) -> tuple[Array, Array, Array]:
        return lost(*point), jax.grad(lost, 3)(*point), jax.hessian(lost, 3)(*point)

    @jax.jit
    @jax.vmap
    def slope(p: Any, posterior: Any) -> Array:
        return jnp.linalg.norm(jax.grad(lost, 3)(p, *posterior, jnp.zeros_like(posterior.mean)))

    total = np.zeros(5)
    worst = 0.0
    for size in _sizes(count, batch):
        drawn = kind.draw(rng, batch)
        given = jax.tree.map(lambda array: jnp.asarray(array[:batch], dtype), drawn)
        keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), batch)
        posterior, info = jax.device_get(search(given, keys))
        info = jax.tree.map(lambda array, size=size: array[:size], info)
        double = jax.tree.map(np.float64, (given, posterior))
        # Elsewhere scipy would return at once.
        is_steep = ~(np.asarray(slope(*double))[:size] < SLOPE)
        gains = [
            _gain(climb, jax.tree.map(lambda array, i=i: array[i], double))
            for i in np.flatnonzero(info.converged & ~info.is_kink & is_steep)
        ]
        worst = max([worst, *gains])
        rounding = 10 * np.finfo(dtype).eps * np.abs(info.log_joint[:, :-1])
        fell = np.any(np.diff(info.log_joint) < -rounding, axis=1)
        false = sum(gain > FALSE for gain in gains)
        total += [size, info.converged.sum(), info.is_kink.sum(), false, fell.sum()]
    examined, converged, kinks, false, fell = map(int, total)
    return Finding(examined, converged, kinks, false, worst, fell)


def _sizes(count: int, batch: int) -> Iterator[int]:
    for start in range(0, count, batch):
        yield min(batch, count - start)


def _gain(climb: Callable, example: Any) -> float:
    """What scipy gains from a converged mode, in nats."""
    p, posterior = example
    mode, chol = posterior
    known: dict[bytes, Any] = {}

    def at(u: np.ndarray, part: int) -> Any:
        if u.tobytes() not in known:
            known.clear()
            known[u.tobytes()] = jax.device_get(climb(p, mode, chol, u))
        return known[u.tobytes()][part]

    start = np.zeros_like(mode)
    lost = float(at(start, 0))
    found = scipy.optimize.minimize(
        lambda u: float(at(u, 0)),
        start,
        jac=lambda u: at(u, 1),
        hess=lambda u: at(u, 2),
        method="trust-exact",
        options={"initial_trust_radius": 0.1, "max_trust_radius": 1.0, "gtol": SLOPE},
    )
    return lost - float(found.fun)


def main() -> None:
    """Print one row a kind, dtype and damping."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="examples of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    dampings: tuple[Damping, ...] = ("line_search", "trust_region")
    ways = [(dtype, damping) for dtype in ("float32", "float64") for damping in dampings]
    share = -(-options.count // (len(KINDS) * len(ways)))
    print(
        "| kind | dtype | damping | searches | converged | of them kinks | false | worst | fell |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in KINDS:
        for dtype, damping in ways:
            found = audit(
                name,
                count=share,
                seed=options.seed,
                dtype=dtype,
                damping=damping,
                num_steps=options.steps,
            )
            print(
                f"| {name} | {dtype} | {damping} | {found.searches} | {found.converged} | "
                f"{found.kinks} | {found.false} | {found.worst:.4f} | {found.fell} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
