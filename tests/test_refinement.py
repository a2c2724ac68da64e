"""Mode searches against closed forms, scipy, and the promises of `RefinementInfo`."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from problems import (
    DIM,
    INDEFINITE,
    LATENT,
    Network,
    assert_close,
    indefinite_kernel,
    random_layers,
    random_vector,
)

from vlae_jax import (
    GaussianPosterior,
    Quadratic,
    bernoulli,
    certify_kink,
    check_kink,
    exact_expansion,
    gauss_newton_expansion,
    gaussian,
    gradient_refine,
    infer_posterior,
    newton_refine,
    scaled_refine,
    shifted_expansion,
    standard_normal,
)
from vlae_jax.refinement import Damping

pytestmark = pytest.mark.usefixtures("quick_compile")

DAMPINGS = get_args(Damping)
NETWORK = Network("tanh", "bernoulli")


@functools.partial(jax.jit, static_argnames=("damping", "num_steps"))
def refine(layers, z_init, *, damping, num_steps):
    """A search of the smooth Bernoulli network, and its log joint recomputed along the way."""
    mode, info = newton_refine(
        NETWORK.gauss_newton(layers), z_init, num_steps=num_steps, damping=damping
    )
    return mode, info, jax.vmap(functools.partial(NETWORK.log_joint, layers))(info.iterates)


# ---------------------------------------------------------------- linear decoders


@functools.partial(jax.jit, static_argnames=("damping", "num_steps"))
def refine_linear(problem, *, damping, num_steps):
    return {
        name: newton_refine(expand, problem.z_init, num_steps=num_steps, damping=damping)
        for name, expand in problem.expansions().items()
    }


def test_paper_steps_leave_a_known_factor_of_the_initial_error(linear_gaussian):
    """Π (1 - 0.5/(t + 1)), whatever the linear decoder and its expansion."""
    problem, truth = linear_gaussian
    for mode, info in refine_linear(problem, damping="paper", num_steps=8).values():
        error = np.float64(problem.z_init) - truth.mode
        for num_steps, factor in [(1, 0.5), (2, 0.375), (4, 0.2734375), (8, 0.196380615234375)]:
            assert_close(info.iterates[num_steps], truth.mode + factor * error)
        np.testing.assert_array_equal(info.iterates[8], mode)


@pytest.mark.parametrize("damping", ["line_search", "trust_region"])
def test_one_full_step_reaches_the_mode_of_a_linear_decoder(linear_gaussian, damping):
    problem, truth = linear_gaussian
    for mode, info in refine_linear(problem, damping=damping, num_steps=1).values():
        assert_close(mode, truth.mode)
        assert info.converged and info.is_pd and info.steps_used == 1
        assert info.newton_decrement < 1e-6


@functools.partial(jax.jit, static_argnames="num_steps")
def refine_scaled(problem, scale, *, num_steps):
    expand = problem.expansions()["affine_head"]
    return scaled_refine(expand, problem.z_init, scale=scale, num_steps=num_steps)


def test_a_scaled_step_is_the_best_of_the_trial_lengths(linear_gaussian):
    """On the quadratic around the known mode, by numpy; converged is its excess energy."""
    problem, truth = linear_gaussian
    precision = np.linalg.inv(truth.covariance)
    scale = np.array([0.7, 1.0, 1.6]) / np.diag(precision)
    mode, info = refine_scaled(problem, jnp.asarray(scale, problem.x.dtype), num_steps=4)
    error = np.float64(problem.z_init) - truth.mode

    def energy(error):
        return 0.5 * error @ precision @ error

    for t in range(4):
        candidates = [error - a * scale * (precision @ error) for a in (1, 0.5, 0.25, 0.125)]
        error = min(candidates, key=energy)
        assert_close(info.iterates[t + 1], truth.mode + error, rtol=1e-4)
    np.testing.assert_array_equal(info.iterates[-1], mode)
    assert_close(info.newton_decrement, energy(error), rtol=1e-3)
    assert info.converged == (energy(error) <= 0.01) and info.is_pd


def test_one_scaled_step_reaches_a_mode_whose_precision_is_the_scales(x64):
    scale = jnp.array([0.1, 3.0, 20.0])
    expand = exact_expansion(lambda z: -0.5 * jnp.sum((z - 2.0) ** 2 / scale))
    mode, info = scaled_refine(expand, jnp.zeros(3), scale=scale, num_steps=1)
    assert_close(mode, np.full(3, 2.0))
    assert info.converged
    with pytest.raises(ValueError, match="scale must have the shape of z"):
        scaled_refine(expand, jnp.zeros(3), scale=jnp.ones(2), num_steps=1)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_scaled_search_never_falls_and_never_calls_a_stall_a_mode(x64, size):
    """Whatever the scale: far too short or too long, it goes up, or says that it is not there."""

    @jax.jit
    @jax.vmap
    def search(layers, z_init):
        expand = NETWORK.gauss_newton(layers)
        mode, info = scaled_refine(expand, z_init, scale=jnp.full(LATENT, size), num_steps=10)
        return info, expand(mode)

    layers = [random_layers(seed) for seed in range(8)]
    stacked = jax.tree.map(lambda *leaves: 3 * jnp.stack(leaves), *layers)
    starts = jnp.stack([3 * random_vector(seed, LATENT) for seed in range(8)])
    info, (_, grads, precisions) = search(stacked, starts)
    assert np.all(np.diff(info.log_joint, axis=1) >= 0)
    assert np.all(info.log_joint[:, -1] > info.log_joint[:, 0])
    steps = np.linalg.solve(precisions, np.asarray(grads)[..., None])[..., 0]
    decrements = 0.5 * np.einsum("bi,bi->b", grads, steps)
    assert_close(info.newton_decrement, decrements, rtol=1e-6)
    assert np.all(decrements[info.converged] <= 0.01)
    assert size != 1e-6 or not np.any(info.converged)


# ---------------------------------------------------------------- monotone searches


@functools.cache
def search_many():
    """By trust region, of 4096 random ReLU and tanh decoders of weak to violent weights."""

    def one(key):
        keys = jax.random.split(key, 7)
        weight_scale = jnp.exp(jax.random.uniform(keys[0], minval=-1.0, maxval=2.0))
        log_var = jax.random.uniform(keys[1], minval=-7.0, maxval=0.0)
        first = weight_scale * jax.random.normal(keys[2], (LATENT, 8))
        second = weight_scale * jax.random.normal(keys[3], (8, DIM))
        is_smooth = jax.random.bernoulli(keys[4])
        x = 3 * jax.random.normal(keys[5], (DIM,))

        def decode(z):
            hidden = z @ first
            return jnp.where(is_smooth, jnp.tanh(hidden), jax.nn.relu(hidden)) @ second

        def log_joint(z):
            return gaussian(x, decode(z), log_var) + standard_normal(z)

        expand = gauss_newton_expansion(decode, lambda eta: gaussian(x, eta, log_var))
        z_init = 2 * jax.random.normal(keys[6], (LATENT,))
        mode, info = newton_refine(expand, z_init, num_steps=6, damping="trust_region")
        start = expand(z_init)
        full_step = z_init + jnp.linalg.solve(start.precision, start.grad)
        return mode, info, jax.vmap(log_joint)(info.iterates), log_joint(full_step)

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4096))


def test_the_log_joint_never_falls_on_thousands_of_random_decoders(x64):
    """Nor by line search, nor in float32: see the test of the engine's robustness."""
    mode, info, along, after_full_step = search_many()
    rounding = 1e-12 * np.max(np.abs(along), axis=1)
    assert np.all(np.diff(along, axis=1) >= -rounding[:, None])
    np.testing.assert_array_equal(info.iterates[:, -1], mode)
    # The property is not free: undamped steps would often fall, and these do climb.
    assert np.mean(after_full_step < along[:, 0]) > 0.2
    assert np.mean(along[:, -1] > along[:, 0]) > 0.95


def test_a_step_that_the_trust_region_refuses_is_not_convergence(x64):
    """It may only have been too long; what is left to gain decides."""
    _, info, _, _ = search_many()
    refused = np.all(info.iterates[:, -1] == info.iterates[:, -2], axis=1)
    far = np.asarray(info.newton_decrement) > 1.0
    assert np.sum(refused & far) > 100
    assert not np.any(info.converged & refused & far)


# ---------------------------------------------------------------- what is reported


@pytest.mark.parametrize("damping", DAMPINGS)
def test_info_log_joint_is_the_log_joint_at_the_iterates(x64, damping):
    z_init = random_vector(1, LATENT)
    mode, info, recomputed = refine(random_layers(1), z_init, damping=damping, num_steps=5)
    assert info.iterates.shape == (6, LATENT) and info.log_joint.shape == (6,)
    np.testing.assert_array_equal(info.iterates[0], z_init)
    np.testing.assert_array_equal(info.iterates[-1], mode)
    assert_close(info.log_joint, np.asarray(recomputed))
    assert info.steps_used == np.sum(np.any(np.diff(info.iterates, axis=0) != 0, axis=1))


def test_no_steps_return_the_first_guess(x64):
    z_init = random_vector(1, LATENT)
    mode, info, recomputed = refine(random_layers(1), z_init, damping="line_search", num_steps=0)
    np.testing.assert_array_equal(mode, z_init)
    np.testing.assert_array_equal(info.iterates, z_init[None])
    assert_close(info.log_joint, np.asarray(recomputed))
    assert info.steps_used == 0 and info.is_pd and not info.converged


def test_newton_decrement_is_half_the_gradient_in_the_metric_of_the_precision(x64):
    layers = random_layers(1)
    mode, info, _ = refine(layers, 3 * jnp.ones(LATENT), damping="paper", num_steps=5)
    _, grad, precision = jax.jit(NETWORK.gauss_newton(layers))(mode)
    expected = 0.5 * np.asarray(grad) @ np.linalg.inv(precision) @ np.asarray(grad)
    assert_close(info.newton_decrement, expected)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_converged_is_true_at_a_mode_and_false_far_from_it(x64, damping):
    """One step from far away gains much more than 0.01 nats, and much is left."""
    layers = random_layers(1)
    mode = jnp.zeros(LATENT)
    for _ in range(6):
        mode, _, _ = refine(layers, mode, damping="line_search", num_steps=5)
    slope = jax.jit(jax.grad(NETWORK.log_joint, argnums=1))(layers, mode)
    assert np.max(np.abs(slope)) < 1e-6
    _, at_mode, _ = refine(layers, mode, damping=damping, num_steps=1)
    assert at_mode.converged and at_mode.newton_decrement < 1e-9
    _, far_away, _ = refine(layers, mode + 5.0, damping=damping, num_steps=1)
    assert far_away.newton_decrement > 0.1 and not far_away.converged


# ---------------------------------------------------------------- indefinite precisions


@pytest.mark.parametrize(
    ("name", "damping"), [("heteroscedastic", "paper"), ("student_t", "paper")]
)
def test_a_paper_step_from_an_indefinite_precision_needs_a_repair(x64, name, damping):
    problem, kernel = INDEFINITE[name], indefinite_kernel()

    @jax.jit
    def search(x):
        expand = exact_expansion(functools.partial(problem.log_joint, kernel, x))
        z_init, stand_in = jnp.zeros(LATENT), problem.stand_in(kernel, x)
        alone = newton_refine(expand, z_init, num_steps=3, damping=damping)
        repaired = newton_refine(expand, z_init, num_steps=3, damping=damping, repair=stand_in)
        return alone, repaired

    (mode, info), (repaired_mode, repaired_info) = search(problem.bad_x)
    np.testing.assert_array_equal(mode, np.zeros(LATENT))
    assert np.all(np.isfinite(info.log_joint)) and info.steps_used == 0
    assert not info.is_pd and not info.converged and np.isnan(info.newton_decrement)
    assert np.any(repaired_mode != 0) and np.all(np.isfinite(repaired_mode))
    assert repaired_info.steps_used == 3 and repaired_info.newton_decrement >= 0


@pytest.mark.parametrize("damping", ["line_search", "trust_region"])
def test_a_search_finds_its_own_way_out_of_an_indefinite_precision(x64, damping):
    problem, kernel = INDEFINITE["student_t"], indefinite_kernel()

    @jax.jit
    def search(x):
        expand = exact_expansion(functools.partial(problem.log_joint, kernel, x))
        return newton_refine(expand, jnp.zeros(LATENT), num_steps=30, damping=damping)

    mode, info = search(problem.bad_x)
    assert info.is_pd and info.newton_decrement < 1e-6
    grad = jax.grad(problem.log_joint, argnums=2)(kernel, problem.bad_x, mode)
    assert np.max(np.abs(grad)) < 1e-2


# ---------------------------------------------------------------- first-order searches

OPTIMIZERS = {
    "adam": (optax.adam(optax.exponential_decay(0.3, 50, 0.5)), 500),
    "momentum": (optax.sgd(0.05, momentum=0.8), 300),
    "lbfgs": (optax.lbfgs(), 30),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_refine_reaches_the_maximum_scipy_finds(x64, name):
    """Logistic regression with a Gaussian prior: smooth and strictly concave."""
    kernel, bias = random_layers(2, (LATENT, DIM))[0]
    x = jnp.asarray(np.arange(DIM) % 2, float)

    def log_joint(z):
        return bernoulli(x, z @ kernel + bias) + standard_normal(z)

    grad = jax.jit(jax.grad(log_joint))
    found = scipy.optimize.minimize(
        lambda z: -float(log_joint(z)), np.zeros(LATENT), jac=lambda z: -grad(z), tol=1e-9
    )
    optimizer, num_steps = OPTIMIZERS[name]

    @jax.jit
    def search(z_init):
        return gradient_refine(log_joint, z_init, optimizer=optimizer, num_steps=num_steps)

    mode, info = search(random_vector(2, LATENT))
    assert_close(mode, found.x, rtol=1e-6)
    assert_close(info.log_joint[-1], -found.fun)
    assert info.converged and info.is_pd and info.newton_decrement < 1e-9
    assert info.iterates.shape == (num_steps + 1, LATENT)


class SteepestDescent:
    """Nothing of optax but the two functions; counts its steps in its state."""

    def init(self, params):
        return jnp.zeros((), int)

    def update(self, grads, state, params=None):
        return -0.1 * grads, state + 1


@jax.jit
def descend(z_init):
    """With five steps and with none."""
    search = functools.partial(gradient_refine, standard_normal, optimizer=SteepestDescent())
    return search(z_init, num_steps=5), search(z_init, num_steps=0)


def test_a_hand_written_optimizer_works(x64):
    """On -½|z|² every step keeps nine tenths of z."""
    z_init = random_vector(3, LATENT)
    (mode, info), _ = descend(z_init)
    kept = 0.9 ** np.arange(6)
    assert_close(info.iterates, kept[:, None] * np.asarray(z_init))
    assert_close(info.newton_decrement, 0.5 * np.sum(np.square(mode)))


def test_gradient_refine_with_no_steps_returns_the_first_guess(x64):
    z_init = random_vector(3, LATENT)
    _, (mode, info) = descend(z_init)
    np.testing.assert_array_equal(mode, z_init)
    assert info.log_joint.shape == (1,) and info.steps_used == 0


# ---------------------------------------------------------------- what float32 cannot hold


def test_a_rejected_infinite_direction_leaves_the_point():
    def expand(z):
        return Quadratic(-0.5 * z @ z, jnp.array([jnp.inf, 0.0]), jnp.eye(2))

    mode, info = newton_refine(expand, jnp.ones(2), num_steps=1, damping="line_search")
    np.testing.assert_array_equal(mode, np.ones(2))
    assert not info.converged


def test_a_stall_by_rounding_is_no_convergence():
    """Next to -10¹² nats, 10,000 are lost."""
    expand = exact_expansion(lambda z: -1e12 - 0.5 * jnp.sum((z - 100.0) ** 2))
    _, info = newton_refine(expand, jnp.zeros(2), num_steps=2, damping="line_search")
    assert info.steps_used == 0 and info.newton_decrement > 9000
    assert not info.converged


def test_a_minimum_with_a_repair_has_not_converged():
    """Its gradient vanishes too, but no mode is there."""

    def log_joint(z):
        return jnp.sum(jnp.cos(3 * z))

    expand = exact_expansion(log_joint)
    _, info = newton_refine(
        expand, jnp.full(2, jnp.pi / 3), num_steps=0, repair=shifted_expansion(expand)
    )
    assert not info.is_pd and info.newton_decrement < 1e-2 and not info.converged


# ---------------------------------------------------------------- no stall unseen


@pytest.mark.parametrize("until_converged", [False, True])
@pytest.mark.parametrize("damping", ["line_search", "trust_region"])
def test_a_newton_step_a_hundred_times_too_long_does_not_end_the_search(damping, until_converged):
    """A Gaussian's mean and log standard deviation of three numbers, 300 times."""
    rng = np.random.default_rng(0)
    ys = rng.normal(size=(300, 1)) + 10 ** rng.uniform(-2, 1, (300, 1)) * rng.normal(size=(300, 3))
    ys[0] = [-0.5517, -0.5489, -0.6294]

    @jax.jit
    @jax.vmap
    def search(y):
        def log_joint(z):
            return gaussian(y, jnp.full(3, z[0]), 2 * z[1]) + standard_normal(z)

        return infer_posterior(
            exact_expansion(log_joint),
            jnp.zeros(2),
            num_steps=60,
            damping=damping,
            until_converged=until_converged,
        )[1]

    info = search(jnp.asarray(ys, jnp.float32))
    assert np.all(info.converged) and np.max(info.newton_decrement) < 1e-2
    assert abs(info.log_joint[0, -1] + 0.692) < 1e-2
    assert np.all(np.diff(info.log_joint, axis=1) >= 0)


def test_converged_is_never_the_absence_of_progress():
    """On the slope of a tent no step gains past the ridge; no decrement vanishes either."""
    expand = exact_expansion(lambda z: -3 * jnp.abs(z[0]) - 0.5 * z @ z + z[1])
    _, info = newton_refine(expand, jnp.array([1e-6, 0.0]), num_steps=30)
    assert not info.converged and not info.is_mode and info.newton_decrement > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["heavy tails", "scales", "saddles", "funnels", "ReLU networks", "mean and log sd", "counts"],
)
def test_no_flag_is_false_by_scipys_trust_region(x64, name):
    from benchmarks.search_audit import audit

    found = audit(
        name, count=300, seed=1, dtype="float32", damping="line_search", num_steps=60, batch=300
    )
    assert found.false == 0 and found.fell == 0 and found.converged > 30


def look_around(log_joint):
    posterior = GaussianPosterior(jnp.array([1e-3, 0.0]), jnp.eye(2))
    _, info = newton_refine(exact_expansion(log_joint), posterior.mean, num_steps=0)
    return (
        check_kink(jax.random.key(0), log_joint, posterior),
        info,
        certify_kink(jax.random.key(0), log_joint, posterior, info),
    )


def test_a_crest_is_certified_and_a_valley_or_a_slope_is_not():
    check, before, after = look_around(lambda z: -3 * jnp.abs(z[0]) - 0.5 * z @ z)
    assert check.least_decrement < 1e-3 and check.rise == 0
    assert not before.converged and after.converged and after.is_kink and not after.is_mode
    check, _, after = look_around(lambda z: 3 * jnp.abs(z[0]) - 0.5 * z @ z)
    assert check.least_decrement < 1e-2 and check.rise > 0.2 and not after.is_kink
    check, _, after = look_around(lambda z: -3 * jnp.abs(z[0]) - 0.5 * z @ z + z[1])
    assert abs(check.least_decrement - 0.5) < 0.15 and not after.converged
    _, before, after = look_around(standard_normal)
    assert before.is_mode and after.is_mode and not after.is_kink
