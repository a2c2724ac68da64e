"""Counts in Haiku: a likelihood in its natural parameter needs nothing but its log density.

The digits are counts out of 16 here; with rectified units Gauss-Newton gives the exact Hessian.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import gammaln
from sklearn.datasets import load_digits

import vlae_jax as vl

LATENT, STEPS = 4, 200
DECODER = hk.without_apply_rng(hk.transform(lambda z: hk.nets.MLP([64, 64])(z)))


def binomial(x, logits):
    """Log probability of counts out of 16, nats."""
    log_ways = gammaln(17.0) - gammaln(x + 1) - gammaln(17 - x)
    return jnp.sum(log_ways + x * logits - 16 * jax.nn.softplus(logits))


def infer(params, x, key):
    """Of one image: the ELBO, and the precision at the mode in both forms."""
    decode = lambda z: DECODER.apply(params, z)
    joint = lambda z: binomial(x, decode(z)) + vl.standard_normal(z)
    expand = vl.gauss_newton_expansion(decode, lambda logits: binomial(x, logits))
    q, _ = vl.infer_posterior(expand, jnp.zeros(LATENT), num_steps=5)
    exact = vl.exact_expansion(joint)(q.mean).precision
    return vl.elbo(key, joint, q, num_samples=4), expand(q.mean).precision, exact


def main():
    """Train; return the held-out bound beside the log-likelihood of independent pixels."""
    x = jax.random.permutation(jax.random.key(1), jnp.asarray(load_digits().data, jnp.float32))
    train, test = x[:1200], x[1200:]
    infer_all, optimizer = jax.jit(jax.vmap(infer, (None, 0, 0))), optax.adam(0.01)
    keys = jax.random.split(jax.random.key(0), (STEPS, len(test)))

    @jax.jit
    def step(params, state, xs, keys):
        slope = jax.grad(lambda params: -jnp.mean(infer_all(params, xs, keys)[0]))(params)
        update, state = optimizer.update(slope, state)
        return optax.apply_updates(params, update), state

    params = DECODER.init(keys[0, 0], jnp.zeros(LATENT))
    state = optimizer.init(params)
    for k in range(STEPS):
        params, state = step(params, state, train[k % 12 :: 12], keys[k, :100])
    elbo, *precisions = infer_all(params, test, keys[0])
    odds = (train.sum(0) + 0.5) / (16 * len(train) - train.sum(0) + 0.5)
    alone = jnp.mean(jax.vmap(binomial, (0, None))(test, jnp.log(odds)))
    print(f"held-out ELBO {jnp.mean(elbo):.2f} nats, independent pixels {alone:.2f} nats")
    return {"elbo": elbo, "alone": alone, "precisions": precisions, "split": (train, test)}


if __name__ == "__main__":
    main()
