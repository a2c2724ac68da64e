"""The posterior of a decoder that is one plain function: probabilistic PCA of the digits.

scikit-learn fits the weights and knows log p(x) in closed form. The model is linear, so one step
reaches the mode, the Laplace posterior is the posterior, its evidence is log p(x), and every single
sample of the ELBO is log p(x) too.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import vlae_jax as vl

LATENT = 8


def decode(weights, z):
    """A latent vector to an image's mean; any function of z will do."""
    return z @ weights["kernel"] + weights["bias"]


def infer(weights, x, key):
    """The evidence, a one-sample ELBO and the share of variance the posterior leaves, for one x."""

    def log_joint(z):
        mean = decode(weights, z)
        return vl.gaussian(x, mean, weights["log_var"]) + vl.standard_normal(z)

    expand = vl.exact_expansion(log_joint)
    posterior, _ = vl.infer_posterior(expand, jnp.zeros(LATENT), num_steps=1)
    evidence = vl.laplace_evidence(expand, posterior.mean)
    return evidence, vl.elbo(key, log_joint, posterior), jnp.diag(posterior.covariance())


def main():
    """Evidence and ELBO beside the closed form, on average over all digits."""
    x = load_digits().data / 16
    pca = PCA(LATENT).fit(x)
    signal = pca.explained_variance_ - pca.noise_variance_
    weights = {
        "kernel": jnp.asarray(pca.components_ * np.sqrt(signal)[:, None], jnp.float32),
        "bias": jnp.asarray(pca.mean_, jnp.float32),
        "log_var": jnp.float32(np.log(pca.noise_variance_)),
    }
    keys = jax.random.split(jax.random.key(0), len(x))
    infer_all = jax.jit(jax.vmap(infer, in_axes=(None, 0, 0)))
    evidence, elbo, variance = infer_all(weights, jnp.asarray(x, jnp.float32), keys)

    print(f"log p(x), scikit-learn's closed form  {pca.score(x):9.4f} nats")
    print(f"Laplace evidence                      {np.mean(evidence):9.4f} nats")
    print(f"ELBO, one sample an image             {np.mean(elbo):9.4f} nats")
    print(f"variance of the prior that is left    {100 * np.mean(variance):9.2f} %")
    return {"x": x, "evidence": evidence, "elbo": elbo, "exact": pca.score_samples(x)}


if __name__ == "__main__":
    main()
