"""What every public core function keeps to, so that it works inside other people's programs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    DIM,
    HIDDEN,
    LATENT,
    decode,
    features,
    random_layers,
    random_vector,
    run_in_subprocess,
)

import vlae_jax
from vlae_jax import (
    DiagonalPosterior,
    GaussianPosterior,
    ImportanceInfo,
    KinkCheck,
    LaplaceSample,
    MixturePosterior,
    Quadratic,
    RefinementInfo,
    SkewedPosterior,
    VariationalInfo,
    affine_head_expansion,
    bernoulli,
    categorical,
    certify_kink,
    check_kink,
    discretized_logistic,
    elbo,
    exact_expansion,
    gauss_newton_expansion,
    gaussian,
    gaussian_heteroscedastic,
    gaussian_heteroscedastic_fisher,
    gaussian_mixture,
    gaussian_mixture_precision,
    gradient_refine,
    heavy_tailed,
    importance_weighted_log_prob,
    infer_posterior,
    iwae_bound,
    laplace_evidence,
    laplace_posterior,
    laplace_sample,
    multivariate_normal,
    negative_binomial,
    newton_refine,
    poisson,
    scaled_refine,
    shifted_expansion,
    standard_normal,
    student_t,
    student_t_fisher,
    variational_refine,
    widened,
    zero_inflated_negative_binomial,
    zero_inflated_negative_binomial_fisher,
    zero_inflated_poisson,
    zero_inflated_poisson_fisher,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
NUM_STEPS = 3  # four iterates, unlike any other size


class Arguments(NamedTuple):
    """The float arrays every case is a function of."""

    layers: list
    log_var: Any
    x: Any
    z: Any
    chol: Any

    def decode(self, z):
        return decode(self.layers, "tanh", z)

    def log_likelihood(self, eta):
        return gaussian(self.x, eta, self.log_var)

    def log_joint(self, z):
        return self.log_likelihood(self.decode(z)) + standard_normal(z)

    def exact(self):
        return exact_expansion(self.log_joint)

    def gauss_newton(self):
        return gauss_newton_expansion(self.decode, self.log_likelihood)

    def affine_head(self, **options):
        hidden = functools.partial(features, self.layers, "tanh")
        return affine_head_expansion(hidden, *self.layers[-1], self.log_var, self.x, **options)

    def posterior(self):
        return GaussianPosterior(self.z, self.chol)

    def of_mixture(self):
        return self.z, self.x[:2], jnp.stack([self.z, -self.z]), jnp.stack([0.3 * self.z] * 2)

    def mixture(self, centered):
        components = (self.posterior(), heavy_tailed(self.posterior(), 5.0))
        return MixturePosterior(components, self.x[:2], self.x[:LATENT] if centered else None)

    def refine(self, **options):
        expand, sizes = self.gauss_newton(), {"num_steps": NUM_STEPS, "num_samples": 4}
        return variational_refine(expand, self.posterior(), KEY, **sizes, **options)


def arguments(seed: int, dtype: type = jnp.float32) -> Arguments:
    return Arguments(
        layers=random_layers(seed, (LATENT, HIDDEN, DIM), dtype),
        log_var=jnp.asarray(-0.3 + 0.1 * seed, dtype),
        x=random_vector(seed, DIM, dtype),
        z=random_vector(seed, LATENT, dtype),
        chol=jnp.tril(jnp.full((LATENT, LATENT), 0.2 + 0.1 * seed, dtype))
        + jnp.eye(LATENT).astype(dtype),
    )


def methods(posterior, z):
    """Every method of a posterior."""
    return {
        "sample": posterior.sample_and_log_prob(jax.random.key(0)),
        "log_prob": posterior.log_prob(z),
        "entropy": posterior.entropy(),
        "kl": posterior.kl_to_standard_normal(),
        "covariance": posterior.covariance(),
    }


def some_methods(posterior, z):
    """Those of a posterior without closed forms."""
    return {
        "sample": posterior.sample_and_log_prob(jax.random.key(0)),
        "log_prob": posterior.log_prob(z),
    }


class Shape(tuple):
    """A shape that is one leaf of a tree, of the arguments' dtype unless another is named."""

    dtype: str = "same"

    def of(self, dtype: str) -> "Shape":
        self.dtype = dtype
        return self


def shape(*sizes: int) -> Shape:
    return Shape(sizes)


QUADRATIC = Quadratic(shape(), shape(LATENT), shape(LATENT, LATENT))
INFO = RefinementInfo(
    iterates=shape(NUM_STEPS + 1, LATENT),
    log_joint=shape(NUM_STEPS + 1),
    newton_decrement=shape(),
    converged=shape().of("bool"),
    is_pd=shape().of("bool"),
    steps_used=shape().of("int"),
    is_kink=shape().of("bool"),
)
VARIATIONAL_INFO = VariationalInfo(
    elbo=shape(NUM_STEPS + 1),
    decrements=shape(NUM_STEPS + 1),
    smoothed_decrement=shape(),
    precision_decrement=shape(),
    sampling_error=shape(),
    converged=shape().of("bool"),
    is_pd=shape().of("bool"),
    steps_used=shape().of("int"),
)
POSTERIOR = GaussianPosterior(shape(LATENT), shape(LATENT, LATENT))
METHODS = {
    "sample": (shape(LATENT), shape()),
    "log_prob": shape(),
    "entropy": shape(),
    "kl": shape(),
    "covariance": shape(LATENT, LATENT),
}


class Case(NamedTuple):
    name: str
    call: Callable[[Arguments], Any]
    shapes: Any


CASES = [
    Case("standard_normal", lambda a: standard_normal(a.z), shape()),
    Case("gaussian", lambda a: gaussian(a.x, a.decode(a.z), a.log_var), shape()),
    Case("bernoulli", lambda a: bernoulli(a.x, a.decode(a.z)), shape()),
    Case("multivariate_normal", lambda a: multivariate_normal(a.z, 0.1 * a.z, a.chol), shape()),
    Case("categorical", lambda a: categorical(jnp.arange(DIM), jnp.outer(a.x, a.x)), shape()),
    Case("poisson", lambda a: poisson(jnp.arange(DIM), a.decode(a.z)), shape()),
    Case(
        "negative_binomial",
        lambda a: negative_binomial(jnp.arange(DIM), a.decode(a.z), a.log_var),
        shape(),
    ),
    Case(
        "zero_inflated_poisson",
        lambda a: zero_inflated_poisson(jnp.arange(DIM), jnp.append(a.decode(a.z), a.x)),
        shape(),
    ),
    Case(
        "zero_inflated_poisson_fisher",
        lambda a: zero_inflated_poisson_fisher(jnp.append(a.decode(a.z), a.x)),
        shape(2, 2, DIM),
    ),
    Case(
        "zero_inflated_negative_binomial",
        lambda a: zero_inflated_negative_binomial(
            jnp.arange(DIM), jnp.append(a.decode(a.z), a.x), a.log_var
        ),
        shape(),
    ),
    Case(
        "zero_inflated_negative_binomial_fisher",
        lambda a: zero_inflated_negative_binomial_fisher(jnp.append(a.decode(a.z), a.x), a.log_var),
        shape(2, 2, DIM),
    ),
    Case(
        "discretized_logistic",
        lambda a: discretized_logistic(jnp.arange(DIM), a.x, a.log_var, high=6.0, levels=7),
        shape(),
    ),
    Case(
        "gaussian_heteroscedastic",
        lambda a: gaussian_heteroscedastic(a.z, jnp.append(a.z, a.x[:LATENT])),
        shape(),
    ),
    Case(
        "gaussian_heteroscedastic_fisher",
        lambda a: gaussian_heteroscedastic_fisher(jnp.append(a.x, a.x)),
        shape(2 * DIM),
    ),
    Case("gaussian_mixture", lambda a: gaussian_mixture(*a.of_mixture()), shape()),
    Case(
        "gaussian_mixture_precision",
        lambda a: gaussian_mixture_precision(*a.of_mixture()),
        shape(LATENT, LATENT),
    ),
    Case("student_t", lambda a: student_t(a.x, a.decode(a.z), a.log_var, 4.0), shape()),
    Case("student_t_fisher", lambda a: student_t_fisher(a.x, a.log_var, 4.0), shape(DIM)),
    Case("exact_expansion", lambda a: a.exact()(a.z), QUADRATIC),
    Case("gauss_newton_expansion", lambda a: a.gauss_newton()(a.z), QUADRATIC),
    Case(
        "gauss_newton_expansion, chunks",
        lambda a: gauss_newton_expansion(a.decode, a.log_likelihood, chunk_size=2)(a.z),
        QUADRATIC,
    ),
    Case("shifted_expansion", lambda a: shifted_expansion(a.exact(), floor=2.0)(a.z), QUADRATIC),
    Case("affine_head_expansion", lambda a: a.affine_head()(a.z), QUADRATIC),
    Case("affine_head_expansion, exact", lambda a: a.affine_head(exact=True)(a.z), QUADRATIC),
    *(
        Case(
            f"newton_refine, {damping}",
            lambda a, damping=damping: newton_refine(
                a.gauss_newton(), a.z, num_steps=NUM_STEPS, damping=damping
            ),
            (shape(LATENT), INFO),
        )
        for damping in ("paper", "line_search", "trust_region")
    ),
    Case(
        "newton_refine, cg",
        lambda a: newton_refine(a.exact(), a.z, num_steps=NUM_STEPS, solver="cg"),
        (shape(LATENT), INFO),
    ),
    Case(
        "infer_posterior, until_converged",
        lambda a: infer_posterior(a.gauss_newton(), a.z, num_steps=NUM_STEPS, until_converged=True),
        (POSTERIOR, INFO),
    ),
    Case(
        "check_kink",
        lambda a: check_kink(jax.random.key(0), a.log_joint, a.posterior(), num_points=8),
        KinkCheck(shape(), shape()),
    ),
    Case(
        "certify_kink",
        lambda a: certify_kink(
            jax.random.key(0),
            a.log_joint,
            *infer_posterior(a.gauss_newton(), a.z, num_steps=NUM_STEPS),
            num_points=8,
        ),
        INFO,
    ),
    Case(
        "gradient_refine",
        lambda a: gradient_refine(a.log_joint, a.z, optimizer=optax.adam(0.1), num_steps=NUM_STEPS),
        (shape(LATENT), INFO),
    ),
    Case(
        "scaled_refine",
        lambda a: scaled_refine(a.gauss_newton(), a.z, scale=a.z**2, num_steps=NUM_STEPS),
        (shape(LATENT), INFO),
    ),
    *(
        Case(
            f"laplace_sample, {solver}, {gradient}",
            lambda a, solver=solver, gradient=gradient: laplace_sample(
                KEY, a.affine_head(), a.z, solver=solver, gradient=gradient, tolerance=1e-3
            ),
            LaplaceSample(
                z=shape(LATENT),
                log_q=shape(),
                mode=shape(LATENT),
                log_det=shape(),
                is_solved=shape().of("bool"),
                num_products=shape().of("int"),
            ),
        )
        for solver, gradient in (("cg", "implicit"), ("cholesky", "unroll"))
    ),
    Case(
        "laplace_posterior",
        lambda a: laplace_posterior(a.exact(), a.z, repair=a.gauss_newton()),
        POSTERIOR,
    ),
    *(
        Case(
            f"infer_posterior, {gradient}",
            lambda a, gradient=gradient: infer_posterior(
                a.affine_head(), a.z, num_steps=NUM_STEPS, gradient=gradient
            ),
            (POSTERIOR, INFO),
        )
        for gradient in ("unroll", "stop", "implicit")
    ),
    Case(
        "infer_posterior, implicit, cg",
        lambda a: infer_posterior(a.affine_head(), a.z, num_steps=NUM_STEPS, solver="cg"),
        (POSTERIOR, INFO),
    ),
    Case("GaussianPosterior", lambda a: methods(a.posterior(), a.x[:LATENT]), METHODS),
    Case(
        "DiagonalPosterior",
        lambda a: methods(DiagonalPosterior(a.z, jnp.diagonal(a.chol)), a.x[:LATENT]),
        METHODS,
    ),
    Case(
        "variational_refine",
        lambda a: elbo(KEY, a.log_joint, a.refine(gradient="stop")[0]),
        shape(),
    ),
    Case(
        "variational_refine, unroll",
        lambda a: a.refine(gradient="unroll", repair=a.exact(), chunk_size=2),
        (POSTERIOR, VARIATIONAL_INFO),
    ),
    Case(
        "SkewedPosterior",
        lambda a: some_methods(SkewedPosterior(a.posterior(), a.log_joint), a.x[:LATENT]),
        {"sample": METHODS["sample"], "log_prob": shape()},
    ),
    *(
        Case(
            f"MixturePosterior, {centered=}",
            lambda a, centered=centered: some_methods(a.mixture(centered), a.x[:LATENT]),
            {"sample": METHODS["sample"], "log_prob": shape()},
        )
        for centered in (False, True)
    ),
    Case(
        "elbo",
        lambda a: elbo(jax.random.key(0), a.log_joint, a.posterior(), num_samples=4),
        shape(),
    ),
    *(
        Case(
            f"iwae_bound, {doubly=}",
            lambda a, doubly=doubly: iwae_bound(
                jax.random.key(0),
                a.log_joint,
                a.posterior(),
                num_samples=4,
                doubly_reparameterized=doubly,
            ),
            shape(),
        )
        for doubly in (False, True)
    ),
    *(
        Case(
            f"iwae_bound, antithetic, {doubly=}",
            lambda a, doubly=doubly: iwae_bound(
                KEY,
                a.log_joint,
                a.posterior(),
                num_samples=4,
                doubly_reparameterized=doubly,
                antithetic=True,
            ),
            shape(),
        )
        for doubly in (False, True)
    ),
    Case("widened", lambda a: widened(a.posterior(), 1.3), POSTERIOR),
    Case(
        "heavy_tailed",
        lambda a: heavy_tailed(a.posterior(), 5.0).log_prob(a.x[:LATENT]),
        shape(),
    ),
    Case("laplace_evidence", lambda a: laplace_evidence(a.gauss_newton(), a.z), shape()),
    Case(
        "importance_weighted_log_prob",
        lambda a: importance_weighted_log_prob(
            jax.random.key(0), a.log_joint, a.posterior(), num_samples=4, chunk_size=3
        ),
        (shape(), ImportanceInfo(shape(), shape(), shape(), shape(1))),
    ),
    Case(
        "importance_weighted_log_prob, antithetic",
        lambda a: importance_weighted_log_prob(
            KEY, a.log_joint, a.posterior(), num_samples=20, chunk_size=6, antithetic=True
        ),
        (shape(), ImportanceInfo(shape(), shape(), shape(), shape(3))),
    ),
]


WITHOUT_GRADIENTS = {"check_kink", "certify_kink"}


def test_every_public_function_is_held_to_the_contract():
    functions = {
        name
        for name in vlae_jax.__all__
        if inspect.isfunction(getattr(vlae_jax, name)) or name.endswith("nPosterior")
    }
    assert {case.name.split(",")[0] for case in CASES} >= functions


# ---------------------------------------------------------------- transformations


def total(tree: Any) -> jax.Array:
    """A scalar to differentiate: all floats of a tree."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in floats)


class Compiled(NamedTuple):
    """One case on three examples, in one program; a program of its own each would take minutes."""

    case: Case
    rows: list[Arguments]
    loop: Any
    """By `jit` and `lax.scan`, one example after the other."""
    vmapped: Any
    gradient: Any
    """Of each example, by reverse mode through `jax.checkpoint`."""
    num_traces: int


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def compiled(request, quick_compile) -> Compiled:
    case, traces = request.param, []

    @jax.jit
    def transform(stacked):
        traces.append(stacked)
        _, loop = jax.lax.scan(lambda _, row: (None, case.call(row)), None, stacked)

        @jax.checkpoint
        def scalar(row):
            value = case.call(row)
            return total(value), value

        gradient, vmapped = jax.vmap(jax.grad(scalar, has_aux=True))(stacked)
        return loop, vmapped, gradient

    rows = [arguments(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    transform(jax.tree.map(jnp.ones_like, stacked))
    return Compiled(case, rows, *transform(stacked), len(traces))


def assert_same(actual, expected):
    """The same numbers, of order one, in another order: rounding amplified by a solve."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected
    )


def test_jit_and_scan_agree_with_eager(compiled):
    last = jax.tree.map(lambda leaf: leaf[-1], compiled.loop)
    assert_same(last, compiled.case.call(compiled.rows[-1]))


def test_vmap_equals_a_loop(compiled):
    assert_same(compiled.vmapped, compiled.loop)


def test_a_second_call_does_not_retrace(compiled):
    """Two calls with different numbers, one trace."""
    assert compiled.num_traces == 1


def test_gradients_are_finite_through_checkpoint(compiled):
    leaves = jax.tree.leaves(compiled.gradient)
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
    if compiled.case.name in WITHOUT_GRADIENTS:
        assert not any(np.any(leaf != 0) for leaf in leaves)
        return
    assert any(np.any(leaf != 0) for leaf in leaves)


# ---------------------------------------------------------------- shapes and dtypes


def assert_shaped(actual, case, dtype):
    """All sizes differ, so that a transposed matrix cannot pass."""
    names = {"same": dtype, "bool": bool, "int": jnp.asarray(0).dtype}
    expected, tree = jax.tree.flatten(case.shapes, is_leaf=lambda node: isinstance(node, Shape))
    assert jax.tree.structure(actual) == tree
    for leaf, size in zip(jax.tree.leaves(actual), expected, strict=True):
        assert (leaf.shape, leaf.dtype) == (size, names[size.dtype])


def test_shapes_are_right(compiled):
    first = jax.tree.map(lambda leaf: leaf[0], compiled.loop)
    assert_shaped(first, compiled.case, jnp.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_arguments_precision_is_kept_where_double_is_the_default(x64, case):
    for dtype in (jnp.float32, jnp.float64):
        assert_shaped(jax.eval_shape(case.call, arguments(0, dtype)), case, dtype)


def check_annotations() -> None:
    """Trace every case with jaxtyping's annotations enforced; a wrong shape must be refused."""
    import jaxtyping

    assert jaxtyping.config.jaxtyping_disable is False
    for case in CASES:
        jax.eval_shape(case.call, arguments(0))
    try:
        jax.eval_shape(gaussian, jnp.zeros(3), jnp.zeros(4), jnp.zeros(()))
    except jaxtyping.TypeCheckError:
        print("enforced")


@pytest.mark.slow
def test_annotations_are_true():
    output = run_in_subprocess(
        "import jaxtyping\n"
        "with jaxtyping.install_import_hook('vlae_jax', 'beartype.beartype'):\n"
        "    import test_contract\n"
        "test_contract.check_annotations()\n",
        timeout=60,
    )
    assert output == "enforced\n"


# ---------------------------------------------------------------- wrong calls

Z, BATCH = jnp.zeros(LATENT), jnp.zeros((2, LATENT))
EXPAND = exact_expansion(standard_normal)
DECODE = gauss_newton_expansion(lambda z: z, standard_normal)
UNSUMMED = exact_expansion(lambda z: -0.5 * z**2)
SGD = optax.sgd(0.1)
UNIT = DiagonalPosterior(Z, Z)


def refine(mean=Z, num_steps=1, num_samples=2, **options):
    start = GaussianPosterior(mean, jnp.eye(LATENT))
    return variational_refine(
        EXPAND, start, KEY, num_steps=num_steps, num_samples=num_samples, **options
    )


WRONG_CALLS = {
    "batch to exact": (lambda: EXPAND(BATCH), "vmap"),
    "batch to Gauss-Newton": (lambda: DECODE(BATCH), "vmap"),
    "batch to newton_refine": (lambda: newton_refine(EXPAND, BATCH, num_steps=1), "vmap"),
    "batch to gradient_refine": (
        lambda: gradient_refine(standard_normal, BATCH, optimizer=SGD, num_steps=1),
        "vmap",
    ),
    "batch to infer_posterior": (lambda: infer_posterior(EXPAND, BATCH, num_steps=1), "vmap"),
    "batch to laplace_posterior": (lambda: laplace_posterior(EXPAND, BATCH), "vmap"),
    "batch to laplace_evidence": (lambda: laplace_evidence(EXPAND, BATCH), "vmap"),
    "integers to exact": (lambda: EXPAND(jnp.arange(3)), "float"),
    "integers to Gauss-Newton": (lambda: DECODE(jnp.arange(3)), "float"),
    "integers to newton_refine": (
        lambda: newton_refine(EXPAND, jnp.arange(3), num_steps=1),
        "float",
    ),
    "integers to gradient_refine": (
        lambda: gradient_refine(standard_normal, jnp.arange(3), optimizer=SGD, num_steps=1),
        "float",
    ),
    "integers to infer_posterior": (
        lambda: infer_posterior(EXPAND, jnp.arange(3), num_steps=1),
        "float",
    ),
    "unsummed log joint": (lambda: UNSUMMED(Z), "scalar.*sum it"),
    "unsummed log joint to newton_refine": (
        lambda: newton_refine(UNSUMMED, Z, num_steps=1),
        "scalar.*sum it",
    ),
    "unsummed log joint to gradient_refine": (
        lambda: gradient_refine(lambda z: -0.5 * z**2, Z, optimizer=SGD, num_steps=1),
        "scalar.*sum it",
    ),
    "unsummed log likelihood": (
        lambda: gauss_newton_expansion(lambda z: z, lambda eta: -(eta**2))(Z),
        "scalar.*sum it",
    ),
    "decoder of images": (
        lambda: gauss_newton_expansion(lambda z: jnp.outer(z, z), lambda eta: -jnp.sum(eta**2))(Z),
        r"\(out,\)",
    ),
    "unknown damping": (
        lambda: newton_refine(EXPAND, Z, num_steps=1, damping="papr"),
        "line_search.*papr",
    ),
    "unknown damping to infer_posterior": (
        lambda: infer_posterior(EXPAND, Z, num_steps=1, damping="papr"),
        "line_search.*papr",
    ),
    "unknown gradient": (
        lambda: infer_posterior(EXPAND, Z, num_steps=1, gradient="implict"),
        "implicit.*'implict'",
    ),
    "unrolled search of no fixed length": (
        lambda: infer_posterior(EXPAND, Z, num_steps=1, gradient="unroll", until_converged=True),
        "until_converged.*'implicit'",
    ),
    "odd number of points around a kink": (
        lambda: check_kink(KEY, standard_normal, GaussianPosterior(Z, jnp.eye(3)), num_points=7),
        "num_points.*even.*7",
    ),
    "no radius around a kink": (
        lambda: check_kink(KEY, standard_normal, GaussianPosterior(Z, jnp.eye(3)), radius=0.0),
        "radius.*positive.*0",
    ),
    "unknown solver": (
        lambda: infer_posterior(EXPAND, Z, num_steps=1, solver="qr"),
        "cholesky.*'qr'",
    ),
    "unknown form": (
        lambda: affine_head_expansion(
            lambda z: z, jnp.eye(LATENT), Z, jnp.zeros(()), Z, form="grams"
        ),
        "explicit.*'grams'",
    ),
    "Fisher information of another shape": (
        lambda: gauss_newton_expansion(
            lambda z: z, standard_normal, fisher=lambda eta: jnp.ones((2, 2, 3))
        )(jnp.zeros(4)),
        r"\(4,\).*\(outputs, outputs, dim\).*\(2, 2, 3\)",
    ),
    "eta of a zero-inflated Poisson": (
        lambda: zero_inflated_poisson(jnp.zeros(3), jnp.zeros(3)),
        r"zero logit.*\(6,\).*\(3,\)",
    ),
    "empty chunks of columns": (
        lambda: exact_expansion(standard_normal, chunk_size=0)(Z),
        "chunk_size.*at least 1.*0",
    ),
    "negative steps": (lambda: newton_refine(EXPAND, Z, num_steps=-1), "num_steps.*-1"),
    "negative steps to gradient_refine": (
        lambda: gradient_refine(standard_normal, Z, optimizer=SGD, num_steps=-1),
        "num_steps.*-1",
    ),
    "negative steps to infer_posterior": (
        lambda: infer_posterior(EXPAND, Z, num_steps=-1),
        "num_steps.*-1",
    ),
    "no samples for the ELBO": (
        lambda: elbo(KEY, standard_normal, UNIT, num_samples=0),
        "num_samples.*at least 1.*0",
    ),
    "no importance samples": (
        lambda: importance_weighted_log_prob(KEY, standard_normal, UNIT, num_samples=0),
        "num_samples.*at least 1.*0",
    ),
    "batch to variational_refine": (lambda: refine(mean=BATCH), "vmap"),
    "odd samples to variational_refine": (lambda: refine(num_samples=3), "num_samples.*even.*3"),
    "no samples to variational_refine": (lambda: refine(num_samples=0), "num_samples.*even.*0"),
    "negative steps to variational_refine": (lambda: refine(num_steps=-1), "num_steps.*-1"),
    "too long a step": (lambda: refine(step_size=1.5), r"step_size.*\(0, 1\].*1.5"),
    "no step of the mean": (lambda: refine(mean_step_size=0.0), "mean_step_size.*0.0"),
    "unknown gradient of variational_refine": (
        lambda: refine(gradient="implicit"),
        "unroll.*'implicit'",
    ),
    "empty chunks of samples": (lambda: refine(chunk_size=0), "chunk_size.*at least 1.*0"),
    "empty chunks": (
        lambda: importance_weighted_log_prob(
            KEY, standard_normal, UNIT, num_samples=4, chunk_size=0
        ),
        "chunk_size.*at least 1.*0",
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_refused_while_tracing(name):
    call, text = WRONG_CALLS[name]
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(call)
