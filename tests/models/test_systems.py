"""The inference systems, one example at a time: their posteriors, gradients and closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions
import pytest
from builders import inferred_by
from flax import nnx
from problems import assert_close

from vlae_jax.errors import UserError
from vlae_jax.matrix_free import LaplaceSample
from vlae_jax.models.autoencoder import VariationalAutoencoder
from vlae_jax.models.flows import FlowPosterior
from vlae_jax.models.laplace import vlae
from vlae_jax.models.systems import find_head, find_system, semi_amortized_vae, vae
from vlae_jax.posterior import (
    ClosedFormPosterior,
    DiagonalPosterior,
    EvaluablePosterior,
    GaussianPosterior,
)
from vlae_jax.runs.config import Config, InferenceConfig, ModelConfig, TrainingConfig
from vlae_jax.runs.methods import METHODS
from vlae_jax.training.objective import objective

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM, LATENT = 40, 3
KEY = jax.random.key(0)


def make(method="vlae", *, hidden=(7, 9), latent=LATENT, activation="relu", **inference):
    """A system and its model, for Gaussian outputs of variance 1."""
    config = Config(
        model=ModelConfig(
            latent=latent,
            hidden=hidden,
            activation=activation,
            variance=METHODS[method].variance,
        ),
        inference=InferenceConfig(method=method, **inference),
        training=TrainingConfig(epochs=0),
    )
    head = find_head(method)
    model = VariationalAutoencoder(
        DIM,
        latent=latent,
        hidden=hidden,
        activation=activation,
        likelihood="gaussian",
        variance=np.ones(DIM),
        posterior_head=head and functools.partial(head, config),
        rngs=nnx.Rngs(0),
    )
    return functools.partial(find_system(method), config=config.inference), model


@pytest.fixture
def x():
    return jax.random.normal(KEY, (DIM,))


# ---------------------------------------------------------------- what all systems have in common

CASES = {
    **{method: InferenceConfig(method=method, steps=2) for method in METHODS},
    "sa_vae, stop": InferenceConfig(method="sa_vae", steps=2, gradient="stop"),
    "vlae, encoder's ELBO": InferenceConfig(steps=2, encoder_loss="elbo"),
    "vlae, scaled search": InferenceConfig(steps=2, search="scaled"),
    "vlae, matrix-free": InferenceConfig(steps=2, posterior="matrix_free"),
    "vlae, matrix-free, encoder's ELBO": InferenceConfig(
        steps=2, search="scaled", posterior="matrix_free", encoder_loss="elbo"
    ),
    "vlae, gradient search": InferenceConfig(steps=2, search="gradient", ascent_clip=1.0),
}
ITERATES = {"sa_vae": 3, "vae_iter": 3, "vlae": 3, "ppca": 2, "fa": 2}


@pytest.mark.parametrize("name", CASES)
def test_every_system_gives_samples_with_their_density_and_trains_what_it_has(name):
    """One program a system, for four images at once."""
    config = CASES[name]
    method = config.method
    system, model = make(**vars(config), hidden=() if METHODS[method].fit else (7,))
    graphdef, params = nnx.split(model)
    xs = jax.random.normal(KEY, (4, DIM))

    def value(params, x, key):
        at = nnx.merge(graphdef, params).at(x)
        return objective(inferred_by(system, at, key).in_training())[0]

    def inference_precision(params, x, z):
        return -jax.hessian(nnx.merge(graphdef, params).at(x).log_joint)(z)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def run(params, x, key):
        inference = system(nnx.merge(graphdef, params).at(x), key)
        posterior = inference.posterior
        z, log_q = posterior.sample_and_log_prob(key)
        if isinstance(posterior, EvaluablePosterior):
            again = posterior.log_prob(z)
        elif isinstance(posterior, LaplaceSample):
            chol = jnp.linalg.cholesky(inference_precision(params, x, posterior.mode))
            again = GaussianPosterior(posterior.mode, chol).log_prob(z)
        else:
            assert isinstance(posterior, FlowPosterior)
            before, log_before = posterior.base.sample_and_log_prob(key)
            jacobian = jax.jacfwd(lambda z: posterior.flow(z, posterior.context)[0])(before)
            again = log_before - jnp.linalg.slogdet(jacobian)[1]
        return z, log_q, again, inference.iterates, jax.grad(value)(params, x, key)

    z, log_q, log_prob, iterates, grads = run(params, xs, jax.random.split(KEY, 4))
    assert z.shape == (4, LATENT)
    np.testing.assert_allclose(log_q, log_prob, rtol=1e-4, atol=1e-4)
    assert iterates.shape == (4, ITERATES.get(method, 1), LATENT)
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(grads)}
    assert all(np.isfinite(grad).all() for grad in flat.values())
    # A Laplace posterior has no use for the encoder's own spread; all else must learn.
    untrained = {key for key, grad in flat.items() if not np.any(grad)}
    is_spared = method in ("vlae", "ppca", "fa") and config.encoder_loss == "distance"
    is_spared &= config.search != "scaled" and config.posterior == "exact"
    expected = {key for key in flat if "log_std" in key} if is_spared else set()
    assert untrained == expected


def test_systems_give_their_kind_of_posterior(x):
    amortized, searched = make("vae"), make("vlae", steps=3)

    @jax.jit
    def both(x):
        inferred = [system(model.at(x), KEY) for system, model in (amortized, searched)]
        return inferred, amortized[1].at(x).mean

    (by_encoder, by_search), guess = both(x)
    assert isinstance(by_encoder.posterior, DiagonalPosterior)
    np.testing.assert_array_equal(by_encoder.iterates[0], guess)
    assert isinstance(by_search.posterior, GaussianPosterior)
    assert by_search.iterates.shape == (4, 3)
    np.testing.assert_array_equal(by_search.iterates[0], guess)


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'vlae'"):
        find_system("vlaes")


def test_all_systems_start_from_the_same_weights():
    """The weights that only one system has are drawn last."""
    plain = jax.tree_util.tree_leaves_with_path(nnx.state(make("vae", hidden=())[1]))
    for method in METHODS:
        state = nnx.state(make(method, hidden=())[1])
        leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(state)}
        for path, leaf in plain:
            np.testing.assert_array_equal(leaves[jax.tree_util.keystr(path)], leaf)


def test_the_full_covariance_starts_near_the_encoders_diagonal(x):
    """The factor is lower triangular; its diagonal is 1 / std, so its determinant the VAE's."""
    system, model = make("vae_full")
    posterior = jax.jit(lambda x: system(model.at(x), KEY))(x).posterior
    chol, std = np.asarray(posterior.chol_precision), np.exp(np.asarray(model.at(x).log_std))
    assert isinstance(posterior, ClosedFormPosterior)
    np.testing.assert_array_equal(np.triu(chol, 1), 0)
    np.testing.assert_allclose(np.diag(chol), 1 / std, rtol=1e-5)
    below = np.abs(np.tril(chol * std, -1))[np.tril_indices(LATENT, -1)]
    assert (below > 0).all() and (below < 0.5).all()


@pytest.mark.parametrize("method", ["vae_full", "vae_hf", "vae_iaf", "vae_planar"])
def test_any_latent_dimension_will_do(x, method):
    """One, or more than there are hidden units: a flow's network is as wide as that at least."""
    for latent in (1, 9):
        system, model = make(method, hidden=(7,), latent=latent, steps=2)
        graphdef, params = nnx.split(model)
        value, _ = jax.eval_shape(
            lambda p, g=graphdef, s=system: objective(inferred_by(s, nnx.merge(g, p).at(x), KEY)),
            params,
        )
        assert value.shape == ()


# ---------------------------------------------------------------- semi-amortized


def blind(model):
    """Make the decoder independent of z: the ELBO's gradient is that of -KL(q ‖ N(0, I))."""
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    return model


def ascend(mean, log_std, *, steps, rate, momentum=0.0, clip=np.inf):
    """Momentum on the gradient of -KL(q ‖ N(0, I)), by numpy: -mean and 1 - variance."""
    point, velocity = np.concatenate([mean, log_std]).astype(np.float64), 0.0
    for _ in range(steps):
        mean, log_std = np.split(point, 2)
        gradient = np.concatenate([-mean, 1 - np.exp(2 * log_std)])
        gradient *= min(1.0, clip / np.linalg.norm(gradient))
        velocity = momentum * velocity + gradient
        point = point + rate * velocity
    return np.split(point, 2)


ASCENTS = {
    "none": {"steps": 0, "rate": 0.1},
    "one": {"steps": 1, "rate": 0.1},
    "momentum": {"steps": 5, "rate": 0.1, "momentum": 0.5},
    "clipped": {"steps": 1, "rate": 0.1, "clip": 0.01},
    "loosely clipped": {"steps": 1, "rate": 0.1, "clip": 1e3},
    "clipped, momentum": {"steps": 5, "rate": 0.1, "clip": 0.5, "momentum": 0.5},
}


def test_ascent_of_an_elbo_without_a_likelihood_has_a_closed_form(x):
    """Also where the gradient is clipped: by its own norm, mean and spread together."""
    _, model = make("sa_vae", hidden=())
    blind(model)

    @jax.jit
    def run(x):
        found = {}
        for name, how in ASCENTS.items():
            config = InferenceConfig(
                method="sa_vae",
                steps=how["steps"],
                ascent_rate=how["rate"],
                ascent_momentum=how.get("momentum", 0.0),
                ascent_clip=how.get("clip"),
            )
            found[name] = semi_amortized_vae(model.at(x), KEY, config)
        return vae(model.at(x), KEY, InferenceConfig()), found

    start, found = run(x)
    mean, log_std = start.posterior
    for name, how in ASCENTS.items():
        refined = found[name]
        assert_close(list(refined.posterior), ascend(mean, log_std, **how))
        np.testing.assert_array_equal(refined.iterates[0], mean)
        np.testing.assert_array_equal(refined.iterates[-1], refined.posterior.mean)
        assert refined.iterates.shape == (how["steps"] + 1, LATENT)
        assert refined.amortization_loss == 0
    np.testing.assert_array_equal(found["none"].posterior, start.posterior)
    moved = np.ravel(found["clipped"].posterior) - np.ravel(start.posterior)
    assert_close(np.linalg.norm(moved), 0.1 * 0.01, rtol=1e-3)
    np.testing.assert_array_equal(found["loosely clipped"].posterior, found["one"].posterior)


def linear(method="vlae", variance=0.5):
    """A model with a linear decoder far from its encoder, and its posterior precision."""
    _, model = make(method, hidden=())
    kernel = 0.4 * jax.random.normal(jax.random.key(1), (LATENT, DIM), jnp.float32)
    model.head.kernel[...] = kernel
    model.head.bias[...] = jax.random.normal(jax.random.key(2), (DIM,), jnp.float32)
    model.mean.bias[...] = jnp.array([2.0, -1.0, 1.5], jnp.float32)
    model.set_log_var(np.log(variance))
    kernel = np.asarray(kernel, np.float64)
    return model, np.eye(LATENT) + kernel @ kernel.T / variance


def mode_of(model, precision, x):
    """The posterior mean, float64."""
    kernel = np.asarray(model.head.kernel[...], np.float64)
    residual = np.asarray(x, np.float64) - np.asarray(model.head.bias[...], np.float64)
    return np.linalg.solve(precision, kernel @ residual / np.exp(np.float64(model.log_var)))


def excess(mean, log_std, mode, precision):
    """KL(q ‖ posterior), by which the ELBO of a diagonal q lies below the evidence."""
    variance, moved = np.exp(2 * log_std), mean - mode
    energy = np.einsum("...i,ij,...j", moved, precision, moved) + variance @ np.diag(precision)
    log_det = np.linalg.slogdet(precision)[1]
    return 0.5 * (energy - LATENT - log_det - np.sum(np.log(variance), axis=-1))


def test_an_encoder_whose_spread_is_used_learns_by_the_divergence_to_the_posterior(x):
    """KL(guess ‖ posterior), once the scaled steps have found the mode; estimated, on average."""
    model, precision = linear()
    exact = InferenceConfig(steps=200, search="scaled")
    sampled = InferenceConfig(steps=200, search="scaled", posterior="matrix_free")

    @jax.jit
    def run(x):
        at = model.at(x)
        return (
            (at.mean, at.log_std),
            vlae(at, KEY, exact),
            jax.vmap(lambda key: vlae(at, key, sampled))(jax.random.split(KEY, 4000)),
        )

    guess, found, drawn = run(x)
    mode = mode_of(model, precision, x)
    assert_close(found.posterior.mean, mode, rtol=5e-3)  # what rounded values can tell
    expected = excess(*np.float64(guess), mode, precision)
    assert_close(found.amortization_loss, expected, rtol=1e-3)
    assert np.all(drawn.flags["is_solved"])
    error = np.std(drawn.amortization_loss) / np.sqrt(4000)
    assert_close(np.mean(drawn.amortization_loss), expected, standard_error=error)
    assert error < 0.05 * expected


def test_the_end_of_scaled_steps_is_held_unless_it_is_to_be_a_mode(x):
    """Away from the mode an implicit derivative would let training reward the distance to it."""
    model, _ = linear()
    graphdef, params = nnx.split(model)

    def end(params, gradient):
        config = InferenceConfig(steps=1, search="scaled", gradient=gradient)
        return vlae(nnx.merge(graphdef, params).at(x), KEY, config).posterior.mean

    moved = {}
    for gradient in ("auto", "stop", "implicit"):
        slopes = jax.jit(jax.jacrev(functools.partial(end, gradient=gradient)))(params)
        moved[gradient] = any(np.any(leaf) for leaf in jax.tree.leaves(slopes))
    assert moved == {"auto": False, "stop": False, "implicit": True}


def test_ascent_climbs_to_the_best_mean_field_gaussian_of_a_linear_model(x):
    """On average over its samples: mean the posterior's, variances 1 / diag(P).

    Both hold exactly in expectation once the ascent is stationary, for any step size.
    """
    model, precision = linear()
    counts = (0, 1, 5, 20, 400)

    @jax.jit
    @jax.vmap
    def run(key):
        configs = [
            InferenceConfig(method="sa_vae", steps=T, ascent_rate=0.01, ascent_momentum=0.0)
            for T in counts
        ]
        return [semi_amortized_vae(model.at(x), key, config).posterior for config in configs]

    posteriors = run(jax.random.split(KEY, 200))
    mode = mode_of(model, precision, x)
    gaps = [excess(np.float64(q.mean), np.float64(q.log_std), mode, precision) for q in posteriors]
    for before, after in itertools.pairwise(gaps):
        gain = before - after
        assert np.mean(gain) > 5 * np.std(gain) / np.sqrt(gain.size)
    mean, log_std = posteriors[-1]
    assert (1 - 0.01 * np.linalg.eigvalsh(precision)[0]) ** 400 < 1e-9, "the start is forgotten"
    error = np.std(mean, axis=0) / np.sqrt(len(mean))
    assert_close(np.mean(mean, axis=0), mode, standard_error=error)
    relative = np.exp(2 * np.float64(log_std)) * np.diag(precision)
    error = np.std(relative, axis=0) / np.sqrt(len(mean))
    assert_close(np.mean(relative, axis=0), np.ones(LATENT), standard_error=error)


def test_an_unrolled_ascent_is_differentiated_and_a_stopped_one_is_not(x):
    """Without a likelihood a step multiplies the mean by 1 - rate."""
    _, model = make("sa_vae", hidden=())
    graphdef, params = nnx.split(blind(model))
    rate, steps = 0.1, 3

    @jax.jit
    def run(params):
        def refine(params, gradient):
            config = InferenceConfig(
                method="sa_vae",
                steps=steps,
                ascent_rate=rate,
                ascent_momentum=0.0,
                gradient=gradient,
            )
            model = nnx.merge(graphdef, params)
            return semi_amortized_vae(model.at(x), KEY, config)

        initial = nnx.merge(graphdef, params).at(x).guess
        jacobians = {
            gradient: jax.jacrev(lambda params, g=gradient: refine(params, g).posterior)(params)
            for gradient in ("auto", "stop")
        }
        stopped = refine(params, "stop")
        normals = [
            numpyro.distributions.Normal(q.mean, jnp.exp(q.log_std))
            for q in (initial, stopped.posterior)
        ]
        kl = jnp.sum(numpyro.distributions.kl_divergence(*normals))
        slopes = jax.grad(lambda params: refine(params, "stop").amortization_loss)(params)
        return initial, jacobians, stopped, kl, slopes

    initial, jacobians, stopped, kl, slopes = run(params)
    unrolled = jacobians["auto"].mean["mean"]["bias"][...]
    assert_close(np.asarray(unrolled), (1 - rate) ** steps * np.eye(LATENT))
    log_std, factor = np.float64(initial.log_std), 1.0
    for _ in range(steps):
        factor *= 1 - 2 * rate * np.exp(2 * log_std)
        log_std += rate * (1 - np.exp(2 * log_std))
    unrolled = jacobians["auto"].log_std["log_std"]["bias"][...]
    assert_close(np.asarray(unrolled), np.diag(factor))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jacobians["stop"]))
    assert_close(stopped.amortization_loss, np.asarray(kl))
    # The amortization loss pulls the encoder's guess towards the end of the ascent.
    variance = np.exp(2 * np.float64(stopped.posterior.log_std))
    pull = (np.float64(initial.mean) - np.float64(stopped.posterior.mean)) / variance
    assert_close(np.asarray(slopes["mean"]["bias"][...]), pull, rtol=1e-4)


@pytest.mark.parametrize(
    "choices",
    [
        {"method": "sa_vae", "gradient": "stop", "steps": 5, "ascent_rate": 0.01},
        {"method": "vlae", "steps": 1},
        {"method": "vae_iter", "steps": 1},
    ],
    ids=lambda choices: choices["method"],
)
def test_an_encoder_may_learn_by_the_elbo_of_its_own_guess(x, choices):
    """Of a linear model that ELBO is known, and so are its derivatives; the decoder gets none.

    The network of `vae_iter` takes one step here, so its guess is the one estimate before the last.
    """
    config = InferenceConfig(encoder_loss="elbo", **choices)
    model, precision = linear(config.method)
    graphdef, params = nnx.split(model)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def run(params, key):
        def infer(params):
            inferred = find_system(config.method)(nnx.merge(graphdef, params).at(x), key, config)
            return inferred.amortization_loss, inferred.posterior

        (loss, posterior), slopes = jax.value_and_grad(infer, has_aux=True)(params)
        of_encoder = slopes["mean"]["bias"][...], slopes["log_std"]["bias"][...]
        of_decoder = [slopes["head"], slopes["scaled_log_var"]]
        return loss, posterior, of_encoder, of_decoder

    loss, posterior, of_encoder, of_decoder = run(params, jax.random.split(KEY, 4000))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_decoder))
    mode, (mean, log_std) = mode_of(model, precision, x), map(np.float64, model.at(x).guess)
    wanted = excess(mean, log_std, mode, precision)
    if config.method != "vlae":  # whose posterior is exact
        found = excess(*map(np.float64, posterior), mode, precision)
        wanted -= np.mean(found)
    slopes = precision @ (mean - mode), np.exp(2 * log_std) * np.diag(precision) - 1
    for sampled, expected in zip((loss, *of_encoder), (wanted, *slopes), strict=True):
        error = np.std(sampled, axis=0) / np.sqrt(len(sampled))
        assert_close(np.mean(sampled, axis=0), expected, standard_error=error)


def test_a_step_of_the_iterative_network_is_gated():
    """By numpy, from the weights: a convex combination of the estimate and the network's."""
    _, model = make("vae_iter", hidden=())
    head = model.posterior_head
    estimate, gradient = jax.random.normal(KEY, (2, 2 * LATENT))
    features = jax.random.normal(jax.random.key(1), (DIM,))

    def standard(v):
        return (np.float64(v) - np.mean(v)) / np.sqrt(np.var(np.float64(v)) + 1e-5)

    def layer(linear, v):
        return v @ np.float64(linear.kernel[...]) + np.float64(linear.bias[...])

    seen = np.concatenate([standard(estimate), standard(gradient), np.float64(features)])
    hidden = layer(head.hidden, seen)
    hidden = np.where(hidden > 0, hidden, np.expm1(hidden))
    gate = 1 / (1 + np.exp(-layer(head.gate, hidden)))
    expected = gate * np.float64(estimate) + (1 - gate) * layer(head.update, hidden)
    assert_close(np.asarray(head(estimate, gradient, features)), expected, rtol=1e-4)


def test_an_ascent_depends_on_its_own_example_alone(x):
    """Neither the batch's size nor the others matter, to a step or to how it is clipped."""
    system, model = make("sa_vae", steps=4, ascent_rate=0.1, ascent_clip=0.5)
    others = 10 * jax.random.normal(jax.random.key(5), (6, DIM))
    keys = jax.random.split(KEY, 7)

    @jax.jit
    def run(x):
        def infer(xs, keys):
            batched = jax.vmap(lambda x, key: system(model.at(x), key).posterior)
            return jax.tree.map(lambda a: a[0], batched(xs, keys))

        alone = system(model.at(x), keys[0]).posterior
        xs = jnp.concatenate([x[None], others])
        return alone, infer(xs[:1], keys[:1]), infer(xs, keys), infer(xs.at[1:].mul(3.0), keys)

    alone, *batched = run(x)
    for posterior in batched:
        assert_close(posterior, jax.tree.map(np.asarray, alone))


# ---------------------------------------------------------------- variational Laplace


def test_the_amortization_loss_is_the_excess_energy_of_the_first_guess(x):
    """For a linear decoder the energy is quadratic, so the loss is the true difference."""
    _, model = make(hidden=())
    others = InferenceConfig(steps=1, gradient="unroll"), InferenceConfig(steps=0)

    @jax.jit
    def infer(x):
        at = model.at(x)
        inference = vlae(at, KEY, InferenceConfig(steps=1))
        excess = at.log_joint(inference.posterior.mean) - at.log_joint(inference.iterates[0])
        losses = [vlae(at, KEY, config).amortization_loss for config in others]
        return inference.amortization_loss, excess, losses

    loss, excess, losses = infer(x)
    np.testing.assert_allclose(loss, excess, rtol=1e-3)
    assert losses == [0, 0]


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("gradient", ["implicit", "stop", "unroll"])
def test_the_encoder_learns_in_every_mode(x, steps, gradient):
    _, model = make(hidden=())
    graphdef, params = nnx.split(model)

    def objective(params):
        # A line search may rightly stay where it is; the paper's damping always moves.
        config = InferenceConfig(steps=steps, gradient=gradient, damping="paper")
        inference = vlae(nnx.merge(graphdef, params).at(x), KEY, config)
        z, log_q = inference.posterior.sample_and_log_prob(jax.random.key(0))
        bound = nnx.merge(graphdef, params).at(x).log_joint(z) - log_q
        return bound - inference.amortization_loss

    grads = nnx.merge(graphdef, jax.jit(jax.grad(objective))(params))
    assert jnp.abs(grads.mean.kernel[...]).max() > 1e-6
    assert jnp.isfinite(grads.mean.kernel[...]).all()


def test_gradient_search_ends_at_the_mode_of_a_linear_model_and_knows_how_it_moves(x, x64):
    """Mode, covariance and the mode's derivative -P⁻¹W/σ² in the decoder's bias, in float64.

    Unrolled, a converged search has the same derivative; stopped it has none.
    """
    model, precision = linear()
    graphdef, params = nnx.split(model)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)
    x = jnp.asarray(x, float)

    direction = jnp.array([0.5, -1.0, 2.0])

    @jax.jit
    def run(params):
        def along(params, gradient):
            config = InferenceConfig(
                steps=500, search="gradient", gradient=gradient, ascent_rate=0.02
            )
            inference = vlae(nnx.merge(graphdef, params).at(x), KEY, config)
            return direction @ inference.posterior.mean, inference

        differentiate = jax.grad(along, has_aux=True)
        return {name: differentiate(params, name) for name in ("implicit", "stop", "unroll")}

    found = run(params)
    slopes, inference = {name: slopes for name, (slopes, _) in found.items()}, found["implicit"][1]
    model = nnx.merge(graphdef, params)
    kernel, variance = np.asarray(model.head.kernel[...]), np.exp(float(model.log_var))
    precision = np.eye(LATENT) + kernel @ kernel.T / variance
    mode = mode_of(model, precision, x)
    assert inference.flags["converged"] and inference.flags["is_pd"]
    assert_close(inference.posterior.mean, mode)
    assert_close(inference.posterior.covariance(), np.linalg.inv(precision))
    assert inference.iterates.shape == (501, LATENT)
    assert_close(inference.iterates[-1], np.asarray(inference.posterior.mean))
    moved = np.asarray(model.at(x).mean) - mode
    assert_close(inference.amortization_loss, 0.5 * moved @ precision @ moved)
    truth = -np.asarray(direction) @ np.linalg.solve(precision, kernel) / variance
    for gradient in ("implicit", "unroll"):
        assert_close(np.asarray(slopes[gradient]["head"]["bias"][...]), truth)
        # The mode does not depend on the start.
        assert np.max(np.abs(slopes[gradient]["mean"]["bias"][...])) < 1e-8
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes["stop"]))


def test_gauss_newton_curvature_is_that_of_the_linearized_decoder(x):
    """Identity plus JᵀJ, for outputs of variance 1: whether or not the Hessian is positive."""
    system, model = make(activation="tanh", steps=1, curvature="gauss_newton")
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(x):
        model = nnx.merge(graphdef, params)
        inference = system(model.at(x), KEY)
        return inference, jax.jacfwd(model.decode)(inference.posterior.mean)

    inference, jacobian = run(x)
    precision = np.eye(LATENT) + np.asarray(jacobian).T @ np.asarray(jacobian)
    assert_close(inference.posterior.chol_precision, np.linalg.cholesky(precision))
    assert inference.flags["is_pd"]


def test_probabilistic_pca_is_exact_wherever_the_encoder_begins(x):
    model, precision = linear()
    inference = jax.jit(lambda x: find_system("ppca")(model.at(x), KEY, InferenceConfig()))(x)
    assert_close(inference.posterior.mean, mode_of(model, precision, x), rtol=1e-4)
    assert_close(inference.posterior.covariance(), np.linalg.inv(precision), rtol=1e-4)
    assert inference.iterates.shape == (2, LATENT)
