"""A decoder trained in one's own loop: a dictionary of weights, optax, no encoder.

gradient="implicit" lets the weights see the mode without differentiating the search for it. The
held-out bound stands beside the exact log-likelihood of PCA with as many dimensions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import vlae_jax as vl

LATENT, HIDDEN, STEPS = 4, 64, 300


@jax.jit
def mean_bound(weights, xs, key):
    """The ELBO by one sample of each image's Laplace posterior, on average over images."""

    def decode(z):
        hidden = jnp.tanh(z @ weights["first"] + weights["bias"])
        return hidden @ weights["second"] + weights["mean"]

    def bound(x, key):
        likelihood = lambda mean: vl.gaussian(x, mean, weights["log_var"])
        expand = vl.gauss_newton_expansion(decode, likelihood)
        q, _ = vl.infer_posterior(expand, jnp.zeros(LATENT), num_steps=4, gradient="implicit")
        return vl.elbo(key, lambda z: likelihood(decode(z)) + vl.standard_normal(z), q)

    return jnp.mean(jax.vmap(bound)(xs, jax.random.split(key, len(xs))))


def main():
    """Train; return the held-out ELBO beside what PCA reaches."""
    x = np.random.default_rng(0).permutation(load_digits().data.astype(np.float32) / 16)
    train, test = jnp.asarray(x[:1297]), jnp.asarray(x[1297:])
    keys = jax.random.split(jax.random.key(0), STEPS)
    random = jax.random.normal(keys[0], (HIDDEN, LATENT + 1 + 64))
    weights = {"first": random[:, :LATENT].T, "bias": random[:, LATENT], "mean": train.mean(0)}
    weights |= {"second": 0.05 * random[:, -64:], "log_var": jnp.log(train.var(0).mean())}
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, STEPS))

    def step(carry, key):
        batch = jax.random.choice(key, train, (100,))
        slope = jax.grad(lambda weights: -mean_bound(weights, batch, key))(carry[0])
        update, state = optimizer.update(slope, carry[1])
        return (optax.apply_updates(carry[0], update), state), None

    (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), keys)
    elbo, pca = float(mean_bound(weights, test, keys[0])), PCA(LATENT).fit(train).score(test)
    print(f"held out: ELBO of the decoder {elbo:.2f} nats, log p(x) of PCA {pca:.2f} nats")
    return {"elbo": elbo, "pca": pca}


if __name__ == "__main__":
    main()
