"""A Flax NNX decoder with convolutions: how good is the Laplace posterior of a trained model?

A module is an argument of plain jax transforms; closed over, its old weights would be compiled in.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import vlae_jax as vl

LATENT, STEPS, SAMPLES = 4, 150, 1000


class Decoder(nnx.Module):
    """One latent vector, without a batch axis, to the logits of 8 × 8 binary pixels."""

    def __init__(self, rngs):
        self.spread = nnx.Linear(LATENT, 4 * 4 * 8, rngs=rngs)
        self.enlarge = nnx.ConvTranspose(8, 1, (4, 4), strides=(2, 2), rngs=rngs)

    def __call__(self, z):
        return self.enlarge(jax.nn.relu(self.spread(z)).reshape(4, 4, 8)).ravel()


def infer(decoder, x, key, num_samples):
    """Of one image: the Laplace evidence, and the importance-weighted estimate with its info."""
    joint = lambda z: vl.bernoulli(x, decoder(z)) + vl.standard_normal(z)
    expand = vl.gauss_newton_expansion(decoder, lambda logits: vl.bernoulli(x, logits))
    q, _ = vl.infer_posterior(expand, jnp.zeros(LATENT), num_steps=5)
    weighted = vl.importance_weighted_log_prob(key, joint, q, num_samples=num_samples)
    return vl.laplace_evidence(expand, q.mean), *weighted


def main():
    """Train on the bound of two samples; return the estimates for held-out images."""
    x = np.random.default_rng(0).permutation(load_digits().data > 7).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), (STEPS, 100))
    infer_all = jax.jit(jax.vmap(infer, (None, 0, 0, None)), static_argnums=3)
    decoder, optimizer = Decoder(nnx.Rngs(0)), optax.adam(0.01)

    @jax.jit
    def train(decoder, state, xs, keys):
        slope = jax.grad(lambda d: -jnp.mean(infer_all(d, xs, keys, 2)[1]))(decoder)
        update, state = optimizer.update(slope, state)
        return optax.apply_updates(decoder, update), state

    state = optimizer.init(decoder)
    for k in range(STEPS):
        decoder, state = train(decoder, state, x[k % 15 : 1500 : 15], keys[k])
    evidence, log_prob, info = infer_all(decoder, x[1500:1600], keys[0], SAMPLES)
    print(f"log p(x): {np.mean(evidence):.2f} by Laplace, {np.mean(log_prob):.2f} by importance")
    return {"evidence": evidence, "log_prob": log_prob, "info": info}


if __name__ == "__main__":
    main()
