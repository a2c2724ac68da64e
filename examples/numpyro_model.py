"""A numpyro model's posterior by one Hessian, beside NUTS on the same model.

Linear regression of disease progression with an unknown noise scale, which numpyro moves to the
whole real line. The Laplace posterior goes back to numpyro as a distribution, is sampled there, and
its samples are taken to the model's own parameters.
"""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from sklearn.datasets import load_diabetes

import vlae_jax as vl
from vlae_jax.interop import numpyro_log_joint, to_numpyro


def model(features, y):
    """Standardized progression given ten standardized measurements."""
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([features.shape[1]]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    numpyro.sample("y", dist.Normal(features @ weights, scale).to_event(1), obs=y)


def laplace_samples(features, y, key):
    """Draws of the model's parameters, and the log evidence."""
    log_joint, z_init, constrain = numpyro_log_joint(model, features, y)
    expand = vl.exact_expansion(log_joint)
    # At the start the Hessian is indefinite: weights and scale compete to explain the data.
    posterior, info = vl.infer_posterior(expand, z_init, num_steps=20, damping="trust_region")
    draws = to_numpyro(posterior).sample(key, (4000,))
    return jax.vmap(constrain)(draws), vl.laplace_evidence(expand, posterior.mean), info


def main():
    """Mean and standard deviation of every parameter, by both."""
    data = load_diabetes()
    features = data.data / data.data.std(axis=0)
    y = (data.target - data.target.mean()) / data.target.std()
    laplace, evidence, info = jax.jit(laplace_samples)(features, y, jax.random.key(0))
    nuts = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model), num_warmup=300, num_samples=1000, progress_bar=False
    )
    nuts.run(jax.random.key(1), features, y)
    rows = {}
    for name, draws in {"laplace": laplace, "nuts": nuts.get_samples()}.items():
        table = np.column_stack([draws["weights"], draws["scale"]])
        rows[name] = table.mean(axis=0), table.std(axis=0)
    print(f"log evidence {evidence:.2f} nats, after {info.steps_used} steps")
    print("parameter    Laplace           NUTS")
    for k, name in enumerate([*data.feature_names, "scale"]):
        (a, b), (c, d) = ((mean[k], std[k]) for mean, std in rows.values())
        print(f"{name:>9}  {a:6.3f} ± {b:.3f}   {c:6.3f} ± {d:.3f}")
    return rows


if __name__ == "__main__":
    main()
