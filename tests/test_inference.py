"""The whole chain: exact where it can be, and its three gradients against finite differences."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from problems import (
    DIM,
    FINITE_DIFFERENCE,
    HIDDEN,
    INDEFINITE,
    LATENT,
    Network,
    assert_close,
    central_differences,
    decode,
    flatten,
    indefinite_kernel,
    kink_margin,
    random_layers,
    random_vector,
    run_in_subprocess,
)

from vlae_jax import (
    elbo,
    exact_expansion,
    gauss_newton_expansion,
    gaussian,
    gradient_refine,
    importance_weighted_log_prob,
    infer_posterior,
    laplace_evidence,
    laplace_posterior,
    newton_refine,
    poisson,
    standard_normal,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

SMOOTH, RELU = Network("tanh", "gaussian"), Network("relu", "bernoulli")
EXPANSIONS = {
    "smooth, exact": SMOOTH.exact,
    "smooth, Gauss-Newton": SMOOTH.gauss_newton,
    "ReLU, Gauss-Newton": RELU.gauss_newton,
}


def weigh(posterior) -> jax.Array:
    """A scalar in which every number of the posterior has its own weight."""
    numbers = flatten((posterior.mean, posterior.chol_precision))
    return numbers @ jnp.cos(jnp.arange(numbers.size, dtype=numbers.dtype))


@jax.jit
def infer_linear(problem):
    return {
        name: infer_posterior(expand, problem.z_init, num_steps=1)
        for name, expand in problem.expansions().items()
    }


def test_one_step_gives_the_exact_posterior_of_a_linear_decoder(linear_gaussian):
    problem, truth = linear_gaussian
    for posterior, info in infer_linear(problem).values():
        assert_close(posterior.mean, truth.mode)
        assert_close(posterior.covariance(), truth.covariance)
        assert info.converged and info.is_pd


# ---------------------------------------------------------------- unroll


def line_search_margin(expand, iterates) -> float:
    """How clearly the best of the five step sizes won at each step, in nats."""

    def margin(z):
        value, grad, precision = expand(z)
        direction = jnp.linalg.solve(precision, grad)
        tried = jax.vmap(lambda size: expand(z + size * direction).value)(
            jnp.array([1.0, 0.5, 0.25, 0.125])
        )
        ranked = jnp.sort(jnp.append(tried, value))
        return ranked[-1] - ranked[-2]

    return float(jnp.min(jax.jit(jax.vmap(margin))(iterates)))


@pytest.mark.parametrize(
    ("name", "damping"), [("smooth, exact", "line_search"), ("ReLU, Gauss-Newton", "paper")]
)
def test_unrolled_gradient_equals_differences_of_the_whole_chain(x64, name, damping):
    """With respect to the decoder's weights and the first guess."""
    make, arguments = EXPANSIONS[name], (random_layers(10), 0.5 * random_vector(10, LATENT))

    def chain(arguments):
        layers, z_init = arguments
        posterior, info = infer_posterior(
            make(layers), z_init, num_steps=3, damping=damping, gradient="unroll"
        )
        return weigh(posterior), info

    gradient, info = jax.jit(jax.grad(chain, has_aux=True))(arguments)
    assert info.is_pd and info.steps_used == 3
    if "ReLU" in name:
        assert kink_margin(arguments[0], info.iterates) > 1e-3
    if damping == "line_search":
        assert line_search_margin(make(arguments[0]), info.iterates[:-1]) > 1e-6
    expected = central_differences(lambda arguments: chain(arguments)[0], arguments)
    assert_close(flatten(gradient), expected, rtol=FINITE_DIFFERENCE)
    assert np.max(np.abs(gradient[1])) > 1e-4


# ---------------------------------------------------------------- implicit


@pytest.mark.parametrize("name", ["smooth, exact", "ReLU, Gauss-Newton"])
def test_implicit_gradient_equals_differences_of_the_converged_chain(x64, name):
    """The precision is the exact Hessian and moves with the mode: through tanh, or through W."""
    make, layers = EXPANSIONS[name], random_layers(7)

    @jax.jit
    @functools.partial(jax.jacrev, has_aux=True)
    def differentiate(layers):
        posterior, info = infer_posterior(
            make(layers), jnp.zeros(LATENT), num_steps=40, gradient="implicit"
        )
        return jnp.stack([jnp.sum(jnp.sin(posterior.mean)), weigh(posterior)]), info

    jacobian, info = differentiate(layers)
    assert info.is_pd and info.newton_decrement < 1e-14

    def chain(layers):
        """A line search stops at the rounding of the log joint; plain Newton steps go further."""
        mode = info.iterates[-1]
        for _ in range(4):
            _, grad, precision = make(layers)(mode)
            mode = mode + jnp.linalg.solve(precision, grad)
        return jnp.stack([jnp.sum(jnp.sin(mode)), weigh(laplace_posterior(make(layers), mode))])

    if "ReLU" in name:
        assert kink_margin(layers, info.iterates[-1:]) > 1e-3
    jacobian = jax.vmap(flatten)(jacobian)
    expected = central_differences(chain, layers)
    for ours, truth in zip(jacobian, expected, strict=True):
        assert_close(ours, truth, rtol=FINITE_DIFFERENCE)


def test_implicit_gradient_is_that_of_one_newton_step_from_the_mode(x64):
    """What is promised of any expansion: P held, so with Gauss-Newton no exact implicit function.

    The mean moves as one step with P held constant, and the precision with the mean.
    """
    make, layers = EXPANSIONS["smooth, Gauss-Newton"], random_layers(5)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def differentiate(layers):
        posterior, _ = infer_posterior(make(layers), jnp.zeros(LATENT), num_steps=3)
        return weigh(posterior), posterior.mean

    gradient, mode = differentiate(layers)
    _, grad_held, precision_held = jax.jit(make(layers))(mode)

    def step(layers):
        change = make(layers)(mode).grad - grad_held
        mean = mode + jnp.linalg.solve(precision_held, change)
        return weigh(laplace_posterior(make(layers), mean))

    expected = central_differences(step, layers)
    assert_close(flatten(gradient), expected, rtol=FINITE_DIFFERENCE)


# ---------------------------------------------------------------- stop


@pytest.mark.parametrize("name", EXPANSIONS)
def test_stop_gradient_equals_differences_with_the_mode_held(x64, name):
    """The precision is still differentiated."""
    make, layers = EXPANSIONS[name], random_layers(2)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def differentiate(layers):
        z_init = 0.5 * random_vector(2, LATENT)
        posterior, info = infer_posterior(make(layers), z_init, num_steps=2, gradient="stop")
        return weigh(posterior), info.iterates

    gradient, iterates = differentiate(layers)
    if "ReLU" in name:
        assert kink_margin(layers, iterates) > 1e-3
    expected = central_differences(
        lambda layers: weigh(laplace_posterior(make(layers), iterates[-1])), layers
    )
    assert np.max(np.abs(expected)) > 1e-2
    assert_close(flatten(gradient), expected, rtol=FINITE_DIFFERENCE)


@pytest.mark.parametrize("gradient", ["stop", "implicit"])
def test_only_unroll_reaches_the_first_guess(x64, gradient):
    layers = random_layers(3)

    @jax.jit
    @jax.grad
    def differentiate(z_init):
        expand = SMOOTH.exact(layers)
        return weigh(infer_posterior(expand, z_init, num_steps=2, gradient=gradient)[0])

    np.testing.assert_array_equal(differentiate(random_vector(3, LATENT)), np.zeros(LATENT))


# ---------------------------------------------------------------- objectives


def test_elbo_gradient_equals_differences_of_the_whole_chain(x64):
    """Search, posterior, samples and bound, all computed again in reverse mode."""
    arguments = (random_layers(4), random_vector(4, LATENT))

    @jax.checkpoint
    def bound(arguments):
        layers, z_init = arguments
        posterior, _ = infer_posterior(
            SMOOTH.gauss_newton(layers), z_init, num_steps=2, damping="paper", gradient="unroll"
        )
        log_joint = functools.partial(SMOOTH.log_joint, layers)
        return elbo(jax.random.key(0), log_joint, posterior, num_samples=3)

    gradient = flatten(jax.jit(jax.grad(bound))(arguments))
    assert np.max(np.abs(gradient[-LATENT:])) > 1e-4
    assert_close(gradient, central_differences(bound, arguments), rtol=FINITE_DIFFERENCE)


def test_the_three_gradients_share_one_value_and_one_info(x64):
    """And it is `newton_refine`, then `laplace_posterior`."""
    layers, z_init = random_layers(6), random_vector(6, LATENT)

    @jax.jit
    def all_ways(z_init):
        expand = SMOOTH.gauss_newton(layers)
        mode, info = newton_refine(expand, z_init, num_steps=3)
        by_hand = (laplace_posterior(expand, mode), info)
        return by_hand, [
            infer_posterior(expand, z_init, num_steps=3, gradient=gradient)
            for gradient in ("unroll", "stop", "implicit")
        ]

    by_hand, ways = all_ways(z_init)
    for way in ways:
        assert_close(way, by_hand)


def test_without_the_hessians_own_factor_the_mode_is_constant(x64):
    """The repaired precision is not what the implicit function theorem asks for."""
    problem, kernel = INDEFINITE["student_t"], indefinite_kernel()

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def mean(kernel, x):
        posterior, info = infer_posterior(
            exact_expansion(functools.partial(problem.log_joint, kernel, x)),
            jnp.zeros(LATENT),
            num_steps=0,
            gradient="implicit",
            repair=problem.stand_in(kernel, x),
        )
        return jnp.sum(posterior.mean), info.is_pd

    (_, is_pd), slope = mean(kernel, problem.good_x + 0.1)
    assert is_pd and np.all(slope != 0)
    (_, is_pd), slope = mean(kernel, problem.bad_x)
    assert not is_pd and np.all(slope == 0)


# ---------------------------------------------------------------- shard_map


WAYS = [
    ("exact", "implicit", "cg"),
    ("gauss_newton", "unroll", "cholesky"),
    ("gauss_newton", "unroll", "cg"),
    ("gauss_newton", "stop", "cholesky"),
    ("gradient_refine", "unroll", ""),
]


def compare_inside_and_outside_shard_map() -> None:
    """Run on eight devices: a first guess that is the same on all must not mix their examples."""
    assert jax.device_count() == 8
    layers = random_layers(0, (LATENT, HIDDEN, DIM), jnp.float32)
    layers = jax.tree.map(lambda weights: 0.5 * weights, layers)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, DIM)), jnp.float32)

    def infer(name, x, gradient, solver):
        """For one example: what comes of it, and a scalar objective."""
        log_likelihood = functools.partial(gaussian, x, log_var=jnp.float32(0))

        def log_joint(z):
            return log_likelihood(decode(layers, "tanh", z)) + standard_normal(z)

        z_init = jnp.zeros(LATENT)
        if name == "gradient_refine":
            mode, _ = gradient_refine(log_joint, z_init, optimizer=optax.adam(0.1), num_steps=3)
            return mode, jnp.sum(jnp.sin(mode))
        expand = {
            "exact": exact_expansion(log_joint),
            "gauss_newton": gauss_newton_expansion(
                functools.partial(decode, layers, "tanh"), log_likelihood
            ),
        }[name]
        # The best of several steps may change with rounding; these do not.
        posterior, info = infer_posterior(
            expand, z_init, num_steps=2, damping="paper", gradient=gradient, solver=solver
        )
        if gradient != "implicit":
            return (posterior, info), weigh(posterior)
        log_prob, importance = importance_weighted_log_prob(
            jax.random.key(1), log_joint, posterior, num_samples=5, chunk_size=2
        )
        return (posterior, info, log_prob, importance), log_prob + weigh(posterior)

    def everything(x):
        """Values, and gradients with respect to x, of each way to infer."""
        found = {}
        for way in WAYS:

            def objective(x, way=way):
                name, gradient, solver = way
                values, scalars = jax.vmap(lambda x: infer(name, x, gradient, solver))(x)
                return jnp.sum(scalars), values

            slope, values = jax.grad(objective, has_aux=True)(x)
            found[" ".join(way)] = {"values": values, "slope": slope}
        return found

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("data")
    inside = jax.jit(jax.shard_map(everything, mesh=mesh, in_specs=split, out_specs=split))(x)
    outside = jax.jit(everything)(x)
    for name in outside:
        for part in ("values", "slope"):
            for one, other in zip(
                jax.tree.leaves(inside[name][part]),
                jax.tree.leaves(outside[name][part]),
                strict=True,
            ):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4, err_msg=name)
        assert np.all(np.isfinite(flatten(outside[name]))), name
    print("agrees:", ", ".join(outside))


@pytest.mark.slow
def test_shard_map_gives_what_one_device_gives():
    """Unguarded, gradients of a z that is the same everywhere are summed over devices."""
    output = run_in_subprocess(
        "import test_inference as t; t.compare_inside_and_outside_shard_map()",
        timeout=180,
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    assert all(" ".join(way) in output for way in WAYS)


def test_the_evidence_has_its_second_derivative_through_the_mode(x64):
    """Of counts that are closed over, batched; held to Newton's steps by hand, differentiated."""
    x = jnp.asarray(np.random.default_rng(0).poisson(3, size=(6, 4)))
    params = jnp.asarray(np.random.default_rng(1).normal(size=12)) / 2

    def evidence(params, x):
        bias, kernel = params[:4], params[4:].reshape(2, 4)
        expand = gauss_newton_expansion(lambda z: z @ kernel + bias, lambda eta: poisson(x, eta))
        posterior, _ = infer_posterior(expand, jnp.zeros(2), num_steps=12)
        return laplace_evidence(expand, posterior.mean), posterior.mean

    def by_hand(params, x, z):
        bias, kernel = params[:4], params[4:].reshape(2, 4)
        for _ in range(4):
            rate = jnp.exp(z @ kernel + bias)
            precision = (kernel * rate) @ kernel.T + jnp.eye(2)
            z = z + jnp.linalg.solve(precision, kernel @ (x - rate) - z)
        eta = z @ kernel + bias
        precision = (kernel * jnp.exp(eta)) @ kernel.T + jnp.eye(2)
        half_log_det = 0.5 * jnp.linalg.slogdet(precision)[1]
        return x @ eta - jnp.sum(jnp.exp(eta)) - 0.5 * (z @ z) - half_log_det

    modes = jax.jit(jax.vmap(evidence, (None, 0)))(params, x)[1]
    totals = (
        lambda params: jnp.sum(jax.vmap(evidence, (None, 0))(params, x)[0]),
        lambda params: jnp.sum(jax.vmap(by_hand, (None, 0, 0))(params, x, modes)),
    )
    actual, expected = (jax.jit(jax.hessian(total))(params) for total in totals)
    assert_close(actual, expected, rtol=FINITE_DIFFERENCE)
