"""The whole engine on very many random decoders, sane and insane, in float32.

Programs take longer to compile than to run a hundred thousand decoders, so there are few of them:
the activation is an argument, and so is the likelihood among those that never overflow.
"""

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlae_jax import (
    GaussianPosterior,
    RefinementInfo,
    bernoulli,
    categorical,
    discretized_logistic,
    elbo,
    exact_expansion,
    gauss_newton_expansion,
    gaussian,
    gaussian_heteroscedastic,
    gaussian_heteroscedastic_fisher,
    infer_posterior,
    poisson,
    shifted_expansion,
    standard_normal,
    student_t,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

NUM_DECODERS = 100_000
"""Shared out among the likelihoods."""
NUM_STEPS = 4
LATENT, HIDDEN, PIXELS, CLASSES = 2, 4, 3, 3
ACTIVATIONS = (jax.nn.relu, jax.nn.leaky_relu, jnp.tanh, jax.nn.softplus, jax.nn.gelu, jax.nn.elu)
FREEDOM = 3.0
EXPONENTIATING = {"heteroscedastic", "poisson"}
"""They exponentiate the decoder's output."""
SANE = 1e9
"""Nats. Beyond, squares and products with weights may leave the range of float32."""


class Problem(NamedTuple):
    """One decoder and one example, or a batch of them."""

    layers: Any
    activation: Any
    """Which of `ACTIVATIONS`."""
    likelihood: Any
    """Which of its program's."""
    x: Any
    log_scale: Any
    """Of the noise, (pixels,); the first is that of all where they share one."""
    z_init: Any
    key: Any


class Likelihood(NamedTuple):
    log_prob: Callable
    """Of x, the decoder's output, and the log scale."""
    draw: Callable
    """(generator, count) → a batch of x, (count, pixels)."""


def draw_reals(rng, count):
    return rng.normal(size=(count, PIXELS)) * 10 ** rng.uniform(-1, 1, (count, 1))


def draw_counts(rng, count):
    return rng.poisson(10 ** rng.uniform(-1, 3, (count, 1)), (count, PIXELS))


LIKELIHOODS = {
    # One scale for all pixels is as many that are equal: see `draw_problems`.
    "gaussian": Likelihood(lambda x, eta, s: gaussian(x, eta, 2 * s), draw_reals),
    "bernoulli": Likelihood(
        lambda x, eta, s: bernoulli(x, eta),
        lambda rng, count: rng.integers(0, 2, (count, PIXELS)),
    ),
    "discretized logistic": Likelihood(
        discretized_logistic, lambda rng, count: rng.integers(0, 256, (count, PIXELS)) / 255
    ),
    "student_t": Likelihood(lambda x, eta, s: student_t(x, eta, s, FREEDOM), draw_reals),
    "categorical": Likelihood(
        lambda x, eta, s: categorical(x.astype(int), eta),
        lambda rng, count: rng.integers(0, CLASSES, (count, PIXELS)),
    ),
    "poisson": Likelihood(lambda x, eta, s: poisson(x, eta), draw_counts),
    "heteroscedastic": Likelihood(lambda x, eta, s: gaussian_heteroscedastic(x, eta), draw_reals),
}


class Program(NamedTuple):
    """What one compilation serves."""

    likelihoods: tuple[str, ...]
    repaired_by: str
    """"shift" of the exact expansion, or "Gauss-Newton", with a Fisher information if given."""
    outputs: int = PIXELS
    fisher: Callable | None = None


PROGRAMS = (
    Program(("gaussian", "bernoulli", "discretized logistic", "student_t"), "shift"),
    Program(("categorical",), "shift", outputs=PIXELS * CLASSES),
    Program(("poisson",), "Gauss-Newton"),
    Program(
        ("heteroscedastic",),
        "Gauss-Newton",
        outputs=2 * PIXELS,
        fisher=gaussian_heteroscedastic_fisher,
    ),
)
PROGRAM_OF = {name: program for program in PROGRAMS for name in program.likelihoods}


def draw_problems(name: str, count: int) -> Problem:
    """Weights from a hundredth to thirty times He's scale, noise from e⁻³ to e, all mixed."""
    program, rng = PROGRAM_OF[name], np.random.default_rng(list(name.encode()))
    loudness = 10 ** rng.uniform(-2, 1.5, count)
    layers = [
        (
            np.einsum("n,nab->nab", loudness, rng.normal(size=(count, a, b))) * np.sqrt(2 / a),
            np.einsum("n,nb->nb", loudness, 0.5 * rng.normal(size=(count, b))),
        )
        for a, b in itertools.pairwise((LATENT, HIDDEN, program.outputs))
    ]
    differs = rng.integers(0, 2, (count, 1))
    problem = Problem(
        layers=layers,
        activation=np.arange(count) % len(ACTIVATIONS),
        likelihood=np.full(count, program.likelihoods.index(name)),
        x=LIKELIHOODS[name].draw(rng, count).astype(float),
        log_scale=rng.uniform(-3, 1, (count, 1)) + differs * 0.5 * rng.normal(size=(count, PIXELS)),
        z_init=rng.normal(size=(count, LATENT)) * 10 ** rng.uniform(-1, 0.5, (count, 1)),
        key=np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), count))),
    )
    single = {np.dtype(float): jnp.float32, np.dtype(int): jnp.int32}
    return jax.tree.map(lambda a: jnp.asarray(a, single.get(a.dtype, a.dtype)), problem)


class Outcome(NamedTuple):
    """All that the engine gives for a batch of problems."""

    bound: Any
    slope: Any
    """Of the bound in the weights."""
    posterior: GaussianPosterior
    info: RefinementInfo
    plain: GaussianPosterior
    """Without repair, found by a trust region."""
    plain_info: RefinementInfo


@jax.jit  # traced once for each of its derivatives, which take longer to trace than to run
def decode(layers, activation, z):
    (kernel, bias), (head, offset) = layers
    units = z @ kernel + bias
    hidden = sum(
        jnp.where(activation == i, activate(units), 0.0) for i, activate in enumerate(ACTIVATIONS)
    )
    return hidden @ head + offset


def infer(program: Program, problem: Problem) -> Outcome:
    """Everything for one problem."""

    def decode_by(layers, z):
        return decode(layers, problem.activation, z)

    def log_likelihood(eta):
        arguments = (problem.x, eta, problem.log_scale)
        return sum(
            jnp.where(problem.likelihood == i, LIKELIHOODS[name].log_prob(*arguments), 0.0)
            for i, name in enumerate(program.likelihoods)
        )

    def log_joint(layers, z):
        return log_likelihood(decode_by(layers, z)) + standard_normal(z)

    def expansions(layers):
        """The exact one, and its repair."""
        exact = exact_expansion(functools.partial(log_joint, layers))
        if program.repaired_by == "shift":
            return exact, shifted_expansion(exact)
        gauss_newton = gauss_newton_expansion(
            functools.partial(decode_by, layers), log_likelihood, fisher=program.fisher
        )
        # Positive definite by form, and not by rounding where its eigenvalues are 8 decades apart.
        return exact, shifted_expansion(gauss_newton)

    def bound(layers):
        exact, repair = expansions(layers)
        posterior, info = infer_posterior(exact, problem.z_init, num_steps=NUM_STEPS, repair=repair)
        key = jax.random.wrap_key_data(problem.key)
        value = elbo(key, functools.partial(log_joint, layers), posterior)
        return value, (posterior, info)

    (value, (posterior, info)), slope = jax.value_and_grad(bound, has_aux=True)(problem.layers)
    exact, _ = expansions(problem.layers)
    plain, plain_info = infer_posterior(
        exact, problem.z_init, num_steps=NUM_STEPS, damping="trust_region"
    )
    return Outcome(value, slope, posterior, info, plain, plain_info)


@functools.cache
def compiled(program: Program) -> Callable[[Problem], Outcome]:
    """As users compile it where exponentials are taken, and quickly (`conftest`) elsewhere.

    Quickly, one exponential in twenty thousand decoders rounds by ten epsilons.
    """
    flag, options = "xla_cpu_use_fusion_emitters", {}
    if EXPONENTIATING & set(program.likelihoods) and flag in os.environ.get("XLA_FLAGS", ""):
        options = {flag: True}
    return jax.jit(jax.vmap(functools.partial(infer, program)), compiler_options=options)


class Run(NamedTuple):
    problems: Problem
    outcome: Outcome
    is_sane: np.ndarray
    """No exponential of a decoder's output came near the end of float32's range.

    Where they are taken, all values on the way and that of the sample are below `SANE` nats.
    """


@functools.cache
def run(name: str) -> Run:
    problems = draw_problems(name, NUM_DECODERS // len(LIKELIHOODS))
    outcome = jax.device_get(compiled(PROGRAM_OF[name])(problems))
    values = np.column_stack([outcome.info.log_joint, outcome.bound, outcome.plain_info.log_joint])
    with np.errstate(invalid="ignore"):
        is_sane = np.all(np.abs(values) < SANE, axis=1)
    return Run(problems, outcome, is_sane if name in EXPONENTIATING else np.ones_like(is_sane))


def is_finite(tree: Any) -> np.ndarray:
    """For each example, whether all its numbers are."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.all([np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1) for leaf in leaves], axis=0)


def check_every_number_is_finite_with_a_repair(name):
    """Mean, factor, iterates, flags, ELBO and its gradient, wherever the model is sane.

    A log rate or a log variance from a loud decoder is exponentiated, which float32 cannot hold;
    no other likelihood ever leaves its range.
    """
    _, outcome, is_sane = run(name)
    everything = (outcome.bound, outcome.slope, outcome.posterior, outcome.info)
    assert np.all(is_finite(everything)[is_sane])
    assert not np.all(outcome.info.is_pd[is_sane]), "nothing to repair"
    if name in EXPONENTIATING:
        assert 0.8 < np.mean(is_sane) < 1


def check_every_failure_without_a_repair_is_flagged(name):
    """NaN factor where the flag says so and nowhere else; the rest of it stays finite."""
    _, outcome, is_sane = run(name)
    has_factor = is_finite(outcome.plain.chol_precision)
    np.testing.assert_array_equal(has_factor, outcome.plain_info.is_pd)
    all_nan = np.all(np.isnan(outcome.plain.chol_precision), axis=(1, 2))
    np.testing.assert_array_equal(all_nan, ~has_factor)
    np.testing.assert_array_equal(np.isnan(outcome.plain_info.newton_decrement), ~has_factor)
    assert not np.any(outcome.plain_info.converged[~has_factor])
    assert np.all(is_finite((outcome.plain.mean, outcome.plain_info.log_joint))[is_sane])
    assert 0.02 < np.mean(~has_factor) < 0.6


def check_a_model_that_overflows_says_so(name):
    """Where exp(η) leaves float32, the value is -inf or what depends on it NaN: never plausible.

    With a repair too: a precision that is not finite stays so, and its factor is NaN.
    """
    _, outcome, _ = run(name)
    overflows = ~is_finite(outcome.info.log_joint[:, 0])
    assert np.sum(overflows) > 100
    for posterior, info in (
        (outcome.posterior, outcome.info),
        (outcome.plain, outcome.plain_info),
    ):
        assert not np.any(np.isposinf(info.log_joint))
        has_factor = is_finite(posterior.chol_precision)
        assert not np.any(info.is_pd & ~has_factor)
        assert not np.any(info.converged & ~(has_factor & is_finite(info.log_joint[:, -1])))
        if name == "poisson":  # a variance too may overflow in its square alone
            assert not np.any(has_factor & ~is_finite(info.log_joint[:, -1]))
    # No bound is made of what is not there.
    is_known = is_finite((outcome.posterior, outcome.info.log_joint[:, -1]))
    assert not np.any(np.isfinite(outcome.bound) & ~is_known)
    assert not np.any(np.isposinf(outcome.bound))


def check_the_log_joint_never_falls(name):
    """By line search with repair and by trust region without, but for the rounding of the value.

    The point that was compared is computed again, and its value rounds otherwise: by up to 8
    machine epsilons of it (or of one nat). A Gaussian of little noise has more: a mean that cancels
    down to x is off by many epsilons of its distance to x.
    """
    _, outcome, is_sane = run(name)
    epsilons = 128 if name in ("gaussian", "heteroscedastic") else 8
    for info in (outcome.info, outcome.plain_info):
        values = np.float64(info.log_joint[is_sane])
        sizes = np.maximum(np.abs(values[:, :-1]), 1)
        assert np.all(np.diff(values, axis=1) >= -epsilons * np.finfo(np.float32).eps * sizes)
        assert np.mean(values[:, -1] > values[:, 0]) > 0.5


def check_no_example_touches_another(name):
    """Put one benign example in the place of all that failed: the others keep their bits."""
    problems, outcome, is_sane = run(name)
    keeps = is_sane & outcome.plain_info.is_pd & outcome.info.is_pd
    index = np.where(keeps, np.arange(keeps.size), np.argmax(keeps))
    benign = jax.device_get(
        compiled(PROGRAM_OF[name])(jax.tree.map(lambda leaf: leaf[index], problems))
    )
    for one, other in zip(jax.tree.leaves(outcome), jax.tree.leaves(benign), strict=True):
        np.testing.assert_array_equal(one[keeps], other[keeps])


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: ", ".join(program.likelihoods))
def test_the_engine_keeps_its_promises(program):
    """All of them in one test, so that one process compiles a program, once."""
    for name in program.likelihoods:
        check_every_number_is_finite_with_a_repair(name)
        check_every_failure_without_a_repair_is_flagged(name)
        if name in EXPONENTIATING:
            check_a_model_that_overflows_says_so(name)
        check_the_log_joint_never_falls(name)
        check_no_example_touches_another(name)
