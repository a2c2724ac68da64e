"""A likelihood of one's own in Equinox: images with outliers, and Hessians that need a repair.

Student's t forgives outliers but is not log-concave: far from the data its Hessian is indefinite.
Such an image is marked is_pd=False and gets a NaN factor, alone in its batch. With the Fisher
information as the named repair every image has a posterior; training takes it throughout.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import vlae_jax as vl

LATENT, STEPS, SCALE = 4, 150, 0.1


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(None, 0, 0, None))
def infer(decoder, x, key, curvature):
    """Of every image: the ELBO, and whether the Hessian was definite without a repair."""
    likelihood = lambda mean: jnp.sum(jax.scipy.stats.t.logpdf(x, 3.0, mean, SCALE))
    information = lambda mean: jnp.full_like(mean, 4 / (6 * SCALE**2))
    joint = lambda z: likelihood(decoder(z)) + vl.standard_normal(z)
    fisher = vl.gauss_newton_expansion(decoder, likelihood, fisher=information)
    expand = fisher if curvature == "fisher" else vl.exact_expansion(joint)
    repair = fisher if curvature == "repaired" else None
    q, info = vl.infer_posterior(expand, jnp.zeros(LATENT), num_steps=6, repair=repair)
    return vl.elbo(key, joint, q, num_samples=5), info.is_pd


@eqx.filter_jit
def train(decoder, xs, keys, optimizer, state):
    """One step of the optimizer."""
    loss = lambda decoder: -jnp.mean(infer(decoder, xs, keys, "fisher")[0])
    update, state = optimizer.update(eqx.filter_grad(loss)(decoder), state)
    return eqx.apply_updates(decoder, update), state


def main():
    """The held-out ELBO of every image: before training, and after it in two ways."""
    rng, x = np.random.default_rng(0), load_digits().data / 16
    x = rng.permutation(np.where(rng.random(x.shape) < 0.05, rng.random(x.shape), x).astype("f4"))
    keys = jax.random.split(jax.random.key(0), (STEPS, 100))
    decoder, optimizer = eqx.nn.MLP(LATENT, 64, 32, 1, jnp.tanh, key=keys[0, 0]), optax.adam(0.01)
    state = optimizer.init(eqx.filter(decoder, eqx.is_array))
    figures = {"before": infer(decoder, x[1500:1600], keys[0], "repaired")}
    for k in range(STEPS):
        decoder, state = train(decoder, x[k % 15 : 1500 : 15], keys[k], optimizer, state)
    for name in ("exact", "repaired"):
        elbo, _ = figures[name] = infer(decoder, x[1500:1600], keys[0], name)
        share = np.mean(np.isfinite(elbo))
        print(f"{name:>8}: {share:4.0%} have a posterior, ELBO {np.nanmean(elbo):.2f} nats")
    return figures


if __name__ == "__main__":
    main()
