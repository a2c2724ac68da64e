"""Annealing against the evidence of linear decoders and quadrature, from both sides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import scipy.stats
from problems import LATENT, assert_close

from vlae_jax import DiagonalPosterior, GaussianPosterior, standard_normal
from vlae_jax.annealing import annealed_importance_sampling, reverse_annealed_importance_sampling

pytestmark = pytest.mark.usefixtures("quick_compile")


def standard_start(latent):
    """The prior, of the same type as the posterior: they share their compiled programs."""
    return GaussianPosterior(jnp.zeros(latent), jnp.eye(latent))


def exact_posterior(truth):
    chol = np.linalg.cholesky(np.linalg.inv(truth.covariance))
    return GaussianPosterior(jnp.asarray(truth.mode, float), jnp.asarray(chol, float))


# ---------------------------------------------------------------- linear decoders


FEW, MANY = 4, 80
"""Temperatures. Both numbers are compiled once, for all tests of this section."""


@functools.partial(jax.jit, static_argnames="num_temperatures")
def sandwich(problem, start, exact, num_temperatures, step_sizes, adapt):
    """Forward and reverse under 200 keys, the latter from a fresh exact sample each."""

    def both(key):
        forward_key, sample_key, reverse_key = jax.random.split(key, 3)
        z_exact, _ = exact.sample_and_log_prob(sample_key)
        options = {
            "num_temperatures": num_temperatures,
            "num_chains": 4,
            "num_leapfrog": 3,
            "step_size": step_sizes,
            "adapt": adapt,
        }
        return (
            annealed_importance_sampling(forward_key, problem.log_joint, start, **options),
            reverse_annealed_importance_sampling(
                reverse_key, problem.log_joint, start, z_exact, **options
            ),
        )

    return jax.vmap(both)(jax.random.split(jax.random.key(0), 200))


def strict_bounds(problem, start, exact, num_temperatures):
    """At a step size that nothing has adapted."""
    step_sizes = jnp.full(num_temperatures - 1, 0.3, float)
    return sandwich(problem, start, exact, num_temperatures, step_sizes, False)


def assert_expected_weight_is_one(log_weights):
    weights = np.exp(np.asarray(log_weights, np.float64))
    error = weights.std() / weights.size**0.5
    assert error < 0.05
    assert_close(weights.mean(), np.float64(1), standard_error=error)


@pytest.fixture(scope="module")
def linear():
    return problems.linear_gaussian(0, jnp.float32, per_pixel=False)


def test_from_the_posterior_every_chain_gives_the_evidence(linear):
    problem, truth = linear
    exact = exact_posterior(truth)
    results = strict_bounds(problem, exact, exact, MANY)
    for log_prob, info in results:
        assert_close(log_prob, np.full(200, truth.log_evidence))
        assert_close(info.ess, np.full(200, 4.0), rtol=1e-5)
        assert np.all(info.standard_error < 1e-3) and np.all(info.is_finite)
        assert np.all(info.num_failed == 0)
    # In the coordinates of the chains, one Gaussian start is like another: here, that of no data.
    start = standard_start(LATENT)
    no_data = problem._replace(kernel=jnp.zeros_like(problem.kernel))
    others = strict_bounds(no_data, start, start, MANY)
    assert_close(results[0][1].acceptance, np.asarray(others[0][1].acceptance), rtol=1e-4)


def test_a_single_temperature_is_importance_sampling(linear):
    """Without a transition there is no acceptance, and one chain knows nothing of its error."""
    problem, truth = linear
    exact = exact_posterior(truth)
    log_prob, info = jax.jit(
        lambda key: annealed_importance_sampling(
            key, problem.log_joint, exact, num_temperatures=1, num_chains=1
        )
    )(jax.random.key(0))
    assert_close(log_prob, truth.log_evidence)
    assert info.step_size.shape == (0,) and info.acceptance == 0
    assert info.ess == 1 and info.standard_error == np.inf and info.is_finite


def is_below(bounds, truth):
    """Whether many bounds are below on average, by more than the noise of that average."""
    bounds = np.asarray(bounds, np.float64)
    return np.mean(bounds) + 3 * np.std(bounds) / np.sqrt(bounds.size) < truth


def test_bounds_lie_on_their_sides_and_close_in_with_temperatures(linear):
    problem, truth = linear
    widths = []
    for num_temperatures in (FEW, MANY):
        (lower, _), (upper, _) = strict_bounds(
            problem, standard_start(LATENT), exact_posterior(truth), num_temperatures
        )
        widths.append(np.mean(upper) - np.mean(lower))
        if num_temperatures == FEW:
            assert is_below(lower, truth.log_evidence)
            assert is_below(-upper, -truth.log_evidence)
    assert 0 < widths[1] < widths[0] / 10


def test_weights_have_the_evidence_as_their_expectation(linear):
    """Of w forward and of 1/w backward, however few the temperatures: the kernels are exact."""
    problem, truth = linear
    (forward, info), (reverse, _) = strict_bounds(
        problem, standard_start(LATENT), exact_posterior(truth), MANY
    )
    assert_expected_weight_is_one(forward - truth.log_evidence)
    assert_expected_weight_is_one(truth.log_evidence - reverse)
    # And each estimate knows its error: in its units, the errors are of size 1 or so.
    errors = np.asarray(forward - truth.log_evidence) / np.asarray(info.standard_error)
    assert 0.5 < np.sqrt(np.mean(errors**2)) < 2


def test_steps_adapt_to_the_acceptance_and_can_be_used_again(linear):
    problem, truth = linear

    def run(first, adapt):
        step_sizes = jnp.broadcast_to(jnp.asarray(first, float), MANY - 1)
        start, exact = standard_start(LATENT), exact_posterior(truth)
        return sandwich(problem, start, exact, MANY, step_sizes, adapt)

    (log_prob, info), (_, back) = run(0.5, True)
    assert info.step_size.shape == (200, MANY - 1)
    assert_expected_weight_is_one(log_prob - truth.log_evidence)
    assert_close(info.acceptance.mean(), np.float64(0.65), rtol=0.1)
    # Nothing has adapted the first step that is taken: at the end of the path, on the way back.
    assert np.all(info.step_size[:, 0] == 0.5) and np.all(back.step_size[:, -1] == 0.5)
    assert np.all(info.step_size[:, 1] != 0.5) and np.all(back.step_size[:, -2] != 0.5)
    for first in (0.05, 5.0):
        (_, late), _ = run(first, True)
        assert_close(late.step_size[:, -1].mean(), info.step_size[:, -1].mean(), rtol=0.1)
    given = info.step_size[0]
    (lower, again), (upper, back) = run(given, False)
    assert_close(again.step_size, np.tile(given, (200, 1)))
    assert_close(back.step_size, np.tile(given, (200, 1)))
    assert_expected_weight_is_one(lower - truth.log_evidence)
    assert_expected_weight_is_one(truth.log_evidence - upper)


def test_where_all_chains_fail_the_bounds_are_infinite_and_nothing_is_nan(linear):
    """By a log joint that is NaN, or by a start that has no density."""
    problem, truth = linear
    start, exact = standard_start(LATENT), exact_posterior(truth)
    nowhere = problem._replace(x=jnp.full_like(problem.x, jnp.nan))
    broken = start._replace(chol_precision=jnp.full((LATENT, LATENT), jnp.nan, float))
    for of_problem, of_start in ((nowhere, start), (problem, broken)):
        forward, reverse = strict_bounds(of_problem, of_start, exact, FEW)
        assert np.all(forward[0] == -np.inf) and np.all(reverse[0] == np.inf)
        for _, info in (forward, reverse):
            assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(info))
            assert not np.any(info.is_finite) and np.all(info.num_failed == 4)
            assert np.all(info.ess == 0) and np.all(info.standard_error == np.inf)


# ---------------------------------------------------------------- posteriors of other shapes


def two_modes(z):
    """Of unequal mass on either side of 0, with nothing in common."""
    left = -0.5 * ((z[0] + 2) / 0.3) ** 2
    right = -0.5 * ((z[0] - 1.5) / 0.5) ** 2 - 1
    return standard_normal(z) + jnp.logaddexp(left, right) - 3 * jnp.log(jnp.cosh(z[1] - z[0]))


def broken_modes(z, edge, floor):
    """As of a model whose decoder overflows: NaN beyond `edge`, with its gradient, and +inf below
    `floor`."""
    return jnp.where(z[1] < floor, jnp.inf, two_modes(z) + 0 * jnp.sqrt(edge - z[0]))


def quadrature(log_joint) -> float:
    """log ∬ p(x, z) dz by the midpoint rule; what is not finite counts as zero."""
    line = (np.arange(1200) + 0.5) / 100 - 6
    grid = jnp.asarray(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2))
    values = np.asarray(jax.jit(jax.vmap(log_joint))(grid), np.float64)
    return float(np.log(np.sum(np.exp(values[np.isfinite(values)])) / 1e4))


@jax.jit
def anneal_modes(edge, floor):
    return annealed_importance_sampling(
        jax.random.key(1),
        lambda z: broken_modes(z, edge, floor),
        DiagonalPosterior(jnp.zeros(2), jnp.zeros(2)),
        num_temperatures=60,
        num_chains=1000,
        num_leapfrog=3,
        step_size=0.3,
    )


@pytest.mark.parametrize(("edge", "floor"), [(1e6, -1e6), (1.0, -1.0), (-1.0, -1e6)])
def test_evidence_equals_quadrature(edge, floor):
    log_prob, info = anneal_modes(edge, floor)
    assert info.is_finite and info.standard_error < 0.1
    truth = quadrature(lambda z: broken_modes(z, edge, floor))
    assert_close(log_prob, truth, standard_error=info.standard_error)
    # Those chains have failed that start where there is no density, and no others.
    share = 1 - scipy.stats.norm.cdf(edge) * scipy.stats.norm.cdf(-floor)
    error = np.sqrt(share * (1 - share) / 1000)
    assert_close(info.num_failed / 1000, share, standard_error=error)
    # Five in six may be stuck; those that are not keep their steps.
    assert info.step_size[-1] > 0.1


def test_a_gaussian_start_sets_the_units_and_ten_thousand_temperatures_add_up():
    """From the posterior itself all weights are p(x), and chains are the same for any scale."""

    @jax.jit
    def anneal(log_std):
        start = DiagonalPosterior(jnp.full(2, 3.0), log_std)
        return annealed_importance_sampling(
            jax.random.key(0),
            lambda z: start.log_prob(z) - 700.3,
            start,
            num_temperatures=10_000,
            num_chains=2,
            num_leapfrog=1,
            adapt=False,
        )

    (log_prob, info), (other, of_other) = (anneal(jnp.array(s)) for s in ([0.0, 0.0], [-5.0, 2.0]))
    assert_close(log_prob, np.float64(-700.3))
    assert_close(other, np.float64(-700.3))
    assert_close(of_other.acceptance, np.asarray(info.acceptance), rtol=1e-4)


# ---------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_temperatures": 0}, "num_temperatures must be at least 1"),
        ({"num_chains": 0}, "num_chains must be at least 1"),
        ({"num_leapfrog": 0}, "num_leapfrog must be at least 1"),
        ({"step_size": np.ones(5)}, r"shape \(num_temperatures - 1,\), got \(5,\) for 5"),
    ],
)
def test_a_wrong_call_is_refused(wrong, message):
    options = {"num_temperatures": 5, "num_chains": 2, **wrong}
    calls = [
        lambda key, z: annealed_importance_sampling(key, two_modes, standard_start(2), **options),
        lambda key, z: reverse_annealed_importance_sampling(
            key, two_modes, standard_start(2), z, **options
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call, jax.random.key(0), jnp.zeros(2))
