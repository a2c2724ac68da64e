"""Normalizing flows: maps checked against their Jacobians, densities against their integrals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.scipy.stats import norm
from problems import assert_close

from vlae_jax import DiagonalPosterior, importance_weighted_log_prob
from vlae_jax.models.flows import (
    FlowPosterior,
    GatedAutoregressiveStep,
    HouseholderFlow,
    InverseAutoregressiveFlow,
    PlanarFlow,
    householder_posterior,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

CONTEXT, STEPS, SEEDS = 4, 2, 6
FLOWS = {
    "householder": HouseholderFlow,
    "planar": PlanarFlow,
    "autoregressive": functools.partial(InverseAutoregressiveFlow, width=7, depth=2),
}


def make(kind, latent, steps=STEPS):
    return FLOWS[kind](latent, CONTEXT, steps, rngs=nnx.Rngs(0))


def abstract(build, *args):
    """The module without its numbers: to draw those, a program for each shape is compiled."""
    return nnx.eval_shape(lambda: build(*args, rngs=nnx.Rngs(0)))


def randomized(module, scale=1.0, dtype=float):
    """The module `SEEDS` times, on a leading axis, with every weight and bias random."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.asarray(scale * rng.normal(size=(SEEDS, *leaf.shape)), dtype), module
    )


def random_flows(kind, latent, steps=STEPS, scale=1.0, dtype=float):
    return randomized(abstract(FLOWS[kind], latent, CONTEXT, steps), scale, dtype)


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def pick(tree, index=0):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@pytest.mark.parametrize("latent", [1, 2, 5])
@pytest.mark.parametrize("kind", FLOWS)
def test_log_det_is_that_of_the_jacobian(x64, kind, latent):
    @jax.jit
    @jax.vmap
    def both(flow, z, context):
        return flow(z, context)[1], jax.jacfwd(lambda z: flow(z, context)[0])(z)

    flows = random_flows(kind, latent, scale=0.5)
    log_det, jacobian = both(flows, normals(1, SEEDS, latent), normals(2, SEEDS, CONTEXT))
    sign, truth = np.linalg.slogdet(jacobian)
    assert_close(np.exp(log_det - truth), np.ones(SEEDS))
    # Two reflections; and no other flow turns anything over.
    assert np.all(sign == 1)
    assert (np.std(log_det) > 0.1) == (kind != "householder")


def test_householder_is_the_product_of_its_matrices(x64):
    latent = 5
    flow = pick(random_flows("householder", latent))
    z, context = normals(1, latent), normals(2, CONTEXT)
    mapped, log_det = flow(z, context)
    product = np.eye(latent)
    for v in np.asarray(flow.vectors(context)):
        product = (np.eye(latent) - 2 * np.outer(v, v) / (v @ v)) @ product
    assert_close(mapped, product @ z)
    assert_close(jnp.linalg.norm(mapped), np.linalg.norm(z))
    assert log_det == 0


def test_the_householder_posterior_is_that_of_the_flow(x64):
    """Both agree, with gradients, for standard deviations of up to e⁶."""
    flow = pick(random_flows("householder", 5))

    def by_factor(base, vectors, z):
        return householder_posterior(base, vectors).log_prob(z)

    def by_reflections(base, vectors, z):
        for v in vectors[::-1]:
            z = z - 2 * v * (v @ z) / (v @ v)
        return base.log_prob(z)

    @jax.jit
    @jax.vmap
    def everything(base, context):
        vectors = flow.vectors(context)
        posterior = householder_posterior(base, vectors)
        z, log_prob = FlowPosterior(base, context, flow).sample_and_log_prob(jax.random.key(0))
        slopes = [jax.grad(f, (0, 1))(base, vectors, z) for f in (by_factor, by_reflections)]
        matrix = jax.jacfwd(lambda z: flow(z, context)[0])(base.mean)
        kl, covariance = posterior.kl_to_standard_normal(), posterior.covariance()
        log_probs = posterior.log_prob(z), log_prob
        return posterior, (matrix, covariance), kl, log_probs, slopes

    scales = np.geomspace(0.1, 3, SEEDS)[:, None] * np.array([-2.0, 0.3, 1.0, 2.0, -0.7])
    bases = DiagonalPosterior(normals(1, SEEDS, 5), scales)
    posteriors, *found = everything(bases, normals(2, SEEDS, CONTEXT))
    chols = posteriors.chol_precision
    assert np.all(np.triu(chols, 1) == 0)
    assert np.all(np.diagonal(chols, axis1=1, axis2=2) > 0)
    for seed in range(SEEDS):
        base, mean = pick(bases, seed), posteriors.mean[seed]
        (matrix, covariance), kl, log_probs, slopes = pick(found, seed)
        variance = np.exp(2 * base.log_std)
        assert_close(*log_probs)
        assert_close(*slopes, rtol=1e-8)  # derivatives of a QR see the condition
        assert_close(mean, matrix @ base.mean)
        assert_close(covariance, (matrix * variance) @ matrix.T)
        # The prior does not see a rotation.
        assert_close(kl, 0.5 * np.sum(variance + base.mean**2 - 1 - np.log(variance)))


@pytest.mark.parametrize("depth", [1, 2])
def test_shift_and_gate_see_the_dimensions_before_them_and_no_others(x64, depth):
    """All before and none after, both exactly; and every one sees all of the context."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def jacobians(step, z, context):
        return jax.jacfwd(step.shift_and_gate, argnums=(0, 1))(z, context)

    for order in ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]):
        steps = randomized(abstract(GatedAutoregressiveStep, order, CONTEXT, 7, depth))
        for by_z, by_context in jacobians(steps, normals(1, 5), normals(2, CONTEXT)):
            for slope in by_z:
                np.testing.assert_array_equal(slope != 0, np.less.outer(order, order).T)
            assert np.all(by_context != 0)


def test_steps_run_forwards_and_backwards_in_turn(x64):
    full = np.ones((5, 5), bool)
    for steps, sees in ((1, np.tril(full)), (2, full)):
        flow = pick(random_flows("autoregressive", 5, steps))
        jacobian = jax.jit(jax.jacfwd(lambda z, c, flow=flow: flow(z, c)[0]))
        np.testing.assert_array_equal(jacobian(normals(1, 5), normals(2, CONTEXT)) != 0, sees)


@pytest.mark.parametrize("kind", FLOWS)
def test_flows_start_quietly_and_can_learn(kind):
    """At first a flow is nearly the identity, apart from gates and reflections, for all contexts.

    Yet the context has an effect on every dimension, and every weight has a gradient.
    """

    @jax.jit
    def everything(flow, zs, contexts):
        def objective(flow):
            mapped, log_dets = jax.vmap(flow)(zs, contexts)
            return jnp.mean(jnp.sum((mapped - zs[::-1]) ** 2, axis=1) - log_dets), mapped

        still = jax.vmap(flow, in_axes=(0, None))(zs, jnp.zeros(CONTEXT))[0]
        return still, jax.grad(objective, has_aux=True)(flow)

    zs, contexts = (np.float32(normals(size, 50, size)) for size in (5, CONTEXT))
    still, (slopes, mapped) = everything(make(kind, 5), zs, contexts)
    expected = {"householder": still, "planar": zs}.get(kind, zs / (1 + np.exp(-2.0)) ** STEPS)
    assert np.std(mapped - expected) < 0.3
    assert np.all(np.std(mapped - still, axis=0) > 1e-3)
    for slope in jax.tree.leaves(slopes):
        assert np.max(np.abs(slope)) > 1e-4


@pytest.mark.parametrize("latent", [1, 2])
@pytest.mark.parametrize("kind", ["planar", "autoregressive"])
def test_flows_keep_probability(x64, kind, latent):
    """∫ p(f(z)) |det f'(z)| dz = 1, which takes an f that reaches every point exactly once.

    By the trapezoidal rule, whose error is that of the kinks of the second derivative.
    """
    points, spacing = np.linspace(-20, 20, 401, retstep=True)
    grid = np.stack(np.meshgrid(*[points] * latent), axis=-1).reshape(-1, latent)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def integrals(flow, context, grid):
        mapped, log_dets = jax.vmap(flow, in_axes=(0, None))(grid, context)
        return jnp.sum(jnp.exp(norm.logpdf(mapped, scale=0.3).sum(1) + log_dets))

    flows = random_flows(kind, latent, scale=0.3)
    found = integrals(flows, normals(2, SEEDS, CONTEXT), grid)
    assert_close(found * spacing**latent, np.ones(SEEDS), rtol=1e-4)


@pytest.mark.parametrize("kind", FLOWS)
def test_importance_weights_average_to_one(kind):
    """E_q[p / q] = 1 for a density p that q covers."""
    flow = pick(random_flows(kind, 2, scale=0.3, dtype=np.float32))
    base = DiagonalPosterior(np.float32([0.3, -0.2]), np.float32([1.0, 1.2]))

    @jax.jit
    def estimate(key, context):
        center, _ = flow(base.mean, context)
        return importance_weighted_log_prob(
            key,
            lambda z: jnp.sum(norm.logpdf(z, center, 0.5)),
            FlowPosterior(base, context, flow),
            num_samples=20_000,
            chunk_size=20_000,
        )

    log_mean, info = estimate(jax.random.key(0), np.float32(normals(2, CONTEXT)))
    assert info.standard_error < 0.03
    assert_close(log_mean, np.zeros(()), standard_error=info.standard_error)


def test_planar_steps_are_invertible_whatever_their_weights(x64):
    """Where wᵀu is millions below what an unconstrained step allows too.

    At its steepest a step has the determinant 1 + wᵀû, here as near zero as 10⁻⁸: to full accuracy.
    """

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def along_w(weights, points):
        direction, across = np.array([0.6, -0.8]), np.array([0.8, 0.6])
        flow = make("planar", 2, 1)
        flow.u.bias = nnx.Param(weights[0] * direction + 3 * across)
        flow.w.bias = nnx.Param(weights[1] * direction)
        flow.b.bias = nnx.Param(weights[2:])

        def move(t):
            mapped, log_det = flow(t * direction, jnp.zeros(CONTEXT))
            return mapped @ direction, log_det

        return jax.vmap(move)(points)

    scales = (-1e6, -30, -1.01, 0, 5), (0, 1e-3, 1, 40), (0, 0.7)
    weights = np.stack(np.meshgrid(*scales), axis=-1).reshape(-1, 3)
    mapped, log_dets = along_w(weights, np.linspace(-3, 3, 501))
    assert np.all(np.isfinite(log_dets))
    assert np.all(np.diff(mapped, axis=1) > 0)
    overlap = weights[:, 0] * weights[:, 1]
    steepest = np.sign(overlap) * np.log1p(np.abs(overlap))
    is_centered = weights[:, 2] == 0
    assert_close(np.exp(log_dets[:, 250] - steepest)[is_centered], np.ones(is_centered.sum()))


@pytest.mark.parametrize("kind", FLOWS)
def test_gradients_are_finite_for_zero_and_huge_numbers(kind):
    """In float32 for zeros and 10⁶ in z, context and weights: zero vectors, saturated gates."""
    sizes = [(z, c, w) for z in (0, 1, 1e6) for c in (0, 1, 1e6) for w in (0, 1, 1e4)]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None, None))
    def slopes(sizes, flow, z, context):
        def objective(flow, z, context):
            mapped, log_det = flow(z, context)
            return jnp.sum(mapped) + log_det

        flow = jax.tree.map(lambda leaf: sizes[2] * leaf, flow)
        args = flow, sizes[0] * z, sizes[1] * context
        return jax.value_and_grad(objective, argnums=(0, 1, 2))(*args)

    z, context = (np.float32(normals(1, size)) for size in (5, CONTEXT))
    flow = pick(random_flows(kind, 5, dtype=np.float32))
    found = slopes(np.float32(sizes), flow, z, context)
    for leaf in jax.tree.leaves(found):
        finite = np.isfinite(leaf).reshape(len(sizes), -1).all(1)
        assert finite.all(), np.array(sizes)[~finite]


def test_stop_gradient_maps_over_a_flow_posterior():
    flow = pick(random_flows("planar", 2, dtype=np.float32))

    @jax.jit
    @jax.jacrev
    def by_context(context):
        posterior = FlowPosterior(DiagonalPosterior(context[:2], context[2:]), context, flow)
        stopped = jax.lax.stop_gradient(posterior)
        draws = [q.sample_and_log_prob(jax.random.key(0)) for q in (posterior, stopped)]
        return jnp.stack([jnp.sum(z) + log_q for z, log_q in draws])

    through, stopped = by_context(np.ones(CONTEXT, np.float32))
    assert np.all(through != 0) and np.all(stopped == 0)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        make("householder", 5, 0)
    with pytest.raises(ValueError, match="width must be at least latent"):
        make("autoregressive", 8)
    for kind in FLOWS:
        with pytest.raises(ValueError, match=r"jax\.vmap over the batch"):
            abstract(FLOWS[kind], 5, CONTEXT, 1)(np.ones((2, 5)), np.ones((2, CONTEXT)))
