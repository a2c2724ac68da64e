"""numpyro's Laplace approximation of the same model: another mode search, another Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation
from problems import DIM, HIDDEN, LATENT, assert_close, decode, random_layers

from vlae_jax import bernoulli, exact_expansion, infer_posterior, standard_normal

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_numpyro_finds_the_same_mode_and_covariance(x64):
    """A smooth Bernoulli network, four examples; guide and SVI made inside the traced function."""
    layers = jax.tree.map(lambda w: 0.7 * w, random_layers(0, (LATENT, HIDDEN, DIM)))
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, DIM)), float)

    def model(x):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
        logits = decode(layers, "tanh", z)
        numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    settling = optax.adam(optax.exponential_decay(0.1, 60, 0.5))

    def by_numpyro(x):
        guide = AutoLaplaceApproximation(model)
        optimizer = numpyro.optim.optax_to_numpyro(settling)
        svi = SVI(model, guide, optimizer, Trace_ELBO())
        state = svi.init(jax.random.key(0), x)
        state, _ = jax.lax.scan(lambda s, _: svi.update(s, x), state, length=600)
        found = guide.get_transform(svi.get_params(state))
        return found.loc, found.scale_tril @ found.scale_tril.T

    def by_us(x):
        def log_joint(z):
            return bernoulli(x, decode(layers, "tanh", z)) + standard_normal(z)

        posterior, info = infer_posterior(
            exact_expansion(log_joint), jnp.zeros(LATENT), num_steps=20
        )
        return posterior.mean, posterior.covariance(), info

    mean, covariance, info = jax.jit(jax.vmap(by_us))(x)
    assert np.all(info.converged) and np.all(info.is_pd)
    expected_mean, expected_covariance = jax.jit(jax.vmap(by_numpyro))(x)
    assert_close(mean, np.asarray(expected_mean), rtol=1e-5)
    assert_close(covariance, np.asarray(expected_covariance), rtol=1e-5)
