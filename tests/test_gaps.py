"""The gaps of probabilistic PCA in closed form, and the search for the best of each family."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from flax import nnx
from problems import DIM, LATENT, assert_close

from vlae_jax import DiagonalPosterior, GaussianPosterior, elbo, standard_normal
from vlae_jax.gaps import Estimate, best_in_family, estimate_elbo, inference_gaps, local_parameters

pytestmark = pytest.mark.usefixtures("quick_compile")


class Conditional(NamedTuple):
    """A flow: the base sample, moved by what shared weights make of the context."""

    base: DiagonalPosterior
    context: jax.Array
    flow: Any

    def sample_and_log_prob(self, key):
        z, log_prob = self.base.sample_and_log_prob(key)
        return z + self.flow(self.context), log_prob

    def log_prob(self, z):
        raise NotImplementedError


# Off by several standard deviations, and of the wrong shape.
SHIFT = jnp.array([0.5, -1.0, 0.3])
BAD_FULL = GaussianPosterior(SHIFT, jnp.array([[0.7, 0, 0], [1.0, 4, 0], [-0.5, 0.2, 1.5]]))
BAD_DIAGONAL = DiagonalPosterior(SHIFT, jnp.array([0.5, -1.0, 0.0]))
BAD_FLOW = Conditional(
    BAD_DIAGONAL, jnp.array([0.3, -0.2]), nnx.Linear(2, LATENT, rngs=nnx.Rngs(0))
)


FAR = 1e6
STARTS = {"full": BAD_FULL, "diagonal": BAD_DIAGONAL, "flow": BAD_FLOW}


@jax.jit
def search(problem, starts, hole, learning_rate):
    """The best of each family, with its ELBO and that of the start; no log joint beyond `hole`."""

    def log_joint(z):
        # NaN there with its gradient, and untouched elsewhere.
        return problem.log_joint(z) + 0 * jnp.sqrt(hole - z[0])

    results = {}
    for name, start in starts.items():
        keys = jax.random.split(jax.random.key(0), 3)
        found = best_in_family(
            keys[0], log_joint, start, num_steps=400, num_samples=8, learning_rate=learning_rate
        )
        elbos = [
            estimate_elbo(key, problem.log_joint, posterior, num_samples=4000, chunk_size=1000)
            for key, posterior in ((keys[1], found), (keys[2], start))
        ]
        results[name] = found, *elbos
    return results


@pytest.fixture(scope="module")
def linear():
    return problems.linear_gaussian(0, jnp.float32, per_pixel=False)


@pytest.fixture(scope="module")
def found(linear, quick_compile):
    problem, truth = linear
    return search(problem, STARTS, FAR, 0.1), truth


def test_the_best_full_covariance_is_the_posterior(found):
    results, truth = found
    posterior, best, start = results["full"]
    assert isinstance(posterior, GaussianPosterior)
    assert_close(np.triu(posterior.chol_precision, 1), np.zeros((LATENT, LATENT), np.float32))
    assert_close(posterior.mean, truth.mode, rtol=1e-3)
    assert_close(posterior.covariance(), truth.covariance, rtol=1e-3)
    # So all is lost by inference, and nothing by the family.
    gaps = inference_gaps(exactly(truth), best, start)
    assert_close(best.value, truth.log_evidence, rtol=1e-5)
    assert_close(gaps.approximation.value, np.float64(0), standard_error=2e-5)
    assert_close(gaps.amortization.value, kl(BAD_FULL, truth), standard_error=start.standard_error)


def test_the_best_diagonal_matches_the_diagonal_of_the_precision(found):
    """KL(q* ‖ p) = ½ (Σ log Pᵢᵢ - log det P), at q* = N(mode, diag(P)⁻¹)."""
    results, truth = found
    posterior, best, start = results["diagonal"]
    precision = np.linalg.inv(truth.covariance)
    assert_close(posterior.mean, truth.mode, rtol=0.02)
    assert_close(jnp.exp(-2 * posterior.log_std), np.diagonal(precision), rtol=0.05)
    gaps = inference_gaps(exactly(truth), best, start)
    least = 0.5 * (np.log(np.diagonal(precision)).sum() - np.linalg.slogdet(precision)[1])
    assert least > 10 * gaps.approximation.standard_error
    assert_close(gaps.approximation.value, least, standard_error=gaps.approximation.standard_error)
    given = kl(BAD_DIAGONAL, truth)
    assert_close(gaps.inference.value, given, standard_error=gaps.inference.standard_error)
    assert_close(
        gaps.amortization.value, given - least, standard_error=gaps.amortization.standard_error
    )


def test_a_flow_moves_its_base_and_context_and_keeps_its_weights(found):
    """It is diagonal here too, so its best is that of the diagonal family."""
    results, truth = found
    posterior, best, _ = results["flow"]
    assert_close(nnx.state(posterior.flow), jax.tree.map(np.asarray, nnx.state(BAD_FLOW.flow)))
    assert np.all(posterior.context != BAD_FLOW.context)
    assert_close(posterior.base.mean + posterior.flow(posterior.context), truth.mode, rtol=0.02)
    other = results["diagonal"][1]
    error = np.hypot(best.standard_error, other.standard_error)
    assert_close(best.value, np.asarray(other.value), standard_error=error)


def exactly(truth):
    return Estimate(truth.log_evidence, np.float64(0))


def kl(posterior, truth):
    """KL(q ‖ posterior) between Gaussians, float64."""
    precision = np.linalg.inv(truth.covariance)
    covariance = np.asarray(posterior.covariance(), np.float64)
    shift = np.asarray(posterior.mean, np.float64) - truth.mode
    log_dets = np.linalg.slogdet(precision @ covariance)[1]
    return 0.5 * (np.trace(precision @ covariance) + shift @ precision @ shift - LATENT - log_dets)


# ---------------------------------------------------------------- searches that go wrong


def test_what_a_search_cannot_improve_is_returned_as_it_is(linear):
    """Steps that leave for infinity, and starts without a density."""
    problem, _ = linear
    broken = {
        "full": BAD_FULL._replace(chol_precision=BAD_FULL.chol_precision * np.nan),
        "diagonal": BAD_DIAGONAL._replace(log_std=BAD_DIAGONAL.log_std * np.nan),
        "flow": BAD_FLOW._replace(context=BAD_FLOW.context * np.nan),
    }
    for starts, learning_rate in ((STARTS, 1e9), (broken, 0.1)):
        results = search(problem, starts, FAR, learning_rate)
        for name, start in starts.items():
            jax.tree.map(np.testing.assert_array_equal, results[name][0], start)


def test_a_log_joint_that_is_nan_somewhere_does_not_end_the_search(linear):
    """Some samples of the starts lie there, but hardly any of the best posteriors."""
    problem, truth = linear
    hole = float(truth.mode[0] + 4 * truth.covariance[0, 0] ** 0.5)
    assert hole < BAD_DIAGONAL.mean[0] + 1.5 * jnp.exp(BAD_DIAGONAL.log_std[0])
    results = search(problem, STARTS, hole, 0.1)
    for name, (posterior, best, _) in results.items():
        assert not np.isnan(best.value), name
        if name == "full":
            assert_close(posterior.covariance(), truth.covariance, rtol=1e-3)
            assert_close(posterior.mean, truth.mode, rtol=1e-3)


# ---------------------------------------------------------------- arithmetic


def test_gaps_add_up_and_errors_add_in_squares():
    rng = np.random.default_rng(0)
    log_prob, best, amortized, converged = (
        Estimate(rng.normal(size=5), rng.uniform(size=5)) for _ in range(4)
    )
    gaps = inference_gaps(log_prob, best, amortized, converged)
    total = gaps.approximation.value + gaps.amortization.value
    assert_close(gaps.inference.value, log_prob.value - amortized.value)
    assert_close(np.asarray(total), log_prob.value - amortized.value)
    assert_close(gaps.non_convergence.value, converged.value - amortized.value)
    expected = np.sqrt(log_prob.standard_error**2 + best.standard_error**2)
    assert_close(gaps.approximation.standard_error, expected)
    assert inference_gaps(log_prob, best, amortized).non_convergence is None


def test_an_estimated_elbo_is_that_of_the_same_key_for_any_chunk_size(x64):
    posterior = DiagonalPosterior(jnp.full(DIM, 0.3), jnp.full(DIM, 0.2))
    key = jax.random.key(0)

    def log_weight(k):
        z, log_q = posterior.sample_and_log_prob(jax.random.fold_in(key, k))
        return standard_normal(z) - log_q

    @jax.jit
    def estimate():
        chunked = [
            estimate_elbo(key, standard_normal, posterior, num_samples=10, chunk_size=size)
            for size in (3, 100)
        ]
        bound = elbo(key, standard_normal, posterior, num_samples=10)
        return bound, jax.vmap(log_weight)(jnp.arange(10)), chunked

    bound, weights, chunked = estimate()
    for value, standard_error in chunked:
        assert_close(value, np.asarray(bound))
        assert_close(standard_error, np.std(weights, ddof=1) / np.sqrt(10))


def test_a_wrong_call_is_refused():
    key = jax.random.key(0)
    for wrong in ("num_steps", "num_samples"):
        with pytest.raises(ValueError, match=f"{wrong} must be at least 1, got 0"):
            best_in_family(
                key, standard_normal, BAD_DIAGONAL, **{"num_steps": 4, "num_samples": 4, wrong: 0}
            )
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        estimate_elbo(key, standard_normal, BAD_DIAGONAL, num_samples=1)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        estimate_elbo(key, standard_normal, BAD_DIAGONAL, num_samples=2, chunk_size=0)
    with pytest.raises(TypeError, match="no rule for the local parameters of a Truth"):
        local_parameters(problems.Truth(0, 0, 0))
