"""Empirical Bayes by nested searches: Optimistix finds the mode, and around it the prior.

Logistic regression of tumours from thirty measurements. The inner search finds the weights' mode;
the outer one maximizes the Laplace evidence over the prior's scale, through the implicit gradient
of the mode. No held-out data choose the prior; they only judge it afterwards.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from sklearn.datasets import load_breast_cancer

import vlae_jax as vl
from vlae_jax.interop import optimistix_refine

INNER = optx.BFGS(rtol=1e-6, atol=1e-6)
OUTER = optx.BFGS(rtol=1e-3, atol=1e-3)


def fit(log_scale, features, labels):
    """The evidence of the prior N(0, exp(log_scale)² I), and the weights' mode under it."""

    def log_joint(z):
        return vl.bernoulli(labels, features @ z) + vl.gaussian(z, 0 * z, 2 * log_scale)

    mode, info = optimistix_refine(log_joint, jnp.zeros(features.shape[1]), solver=INNER)
    return vl.laplace_evidence(vl.exact_expansion(log_joint), mode), (mode, info)


def main():
    """The learned prior beside two others: evidence, and held-out log-likelihood a patient."""
    data = load_breast_cancer()
    rows = np.random.default_rng(0).permutation(len(data.target))
    features = jnp.asarray((data.data - data.data.mean(0)) / data.data.std(0))[rows]
    labels = jnp.asarray(data.target, features.dtype)[rows]
    train, test = (features[:300], labels[:300]), (features[300:], labels[300:])

    found = jax.jit(lambda start: optx.minimise(lambda s, _: -fit(s, *train)[0], OUTER, start))
    learned = found(jnp.zeros(())).value
    scales = jnp.stack([jnp.float32(-3), learned, jnp.float32(2)])
    evidence, (modes, info) = jax.jit(jax.vmap(fit, (0, None, None)))(scales, *train)
    held_out = jax.vmap(lambda mode: vl.bernoulli(test[1], test[0] @ mode))(modes) / len(test[1])
    for row in zip(jnp.exp(scales), evidence, held_out, info.steps_used, strict=True):
        print("scale {:6.3f}: evidence {:8.2f}, held out {:.4f}, {} steps".format(*row))
    return {"log_scale": learned, "evidence": evidence, "held_out": held_out, "train": train}


if __name__ == "__main__":
    main()
