"""Estimates of log p(x) with a proposal for each image, against quadrature and closed forms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import digits, untrained
from scipy.special import logsumexp

from vlae_jax.analysis import evaluation
from vlae_jax.analysis.estimation import (
    ANNEALING,
    Effort,
    anneal_log_prob,
    estimate_log_prob,
    within_budget,
)
from vlae_jax.analysis.evaluation import evaluate
from vlae_jax.runs.config import Config, InferenceConfig, ModelConfig, TrainingConfig

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def bent():
    """A model of one latent dimension with a nonlinear decoder and an untrained encoder."""
    config = Config(
        model=ModelConfig(latent=1, hidden=(8,), min_std=0.3),
        inference=InferenceConfig("vae"),
        training=TrainingConfig(epochs=0, batch_size=16),
    )
    trained = untrained(config)
    # A louder decoder than an untrained one: the posterior is then neither Gaussian nor the prior.
    params = jax.tree.map(lambda leaf: leaf, trained.params)
    kernel = params["head"]["kernel"]
    kernel[...] = 3.0 * kernel[...] / jnp.std(kernel[...])
    return trained.with_params(params)


def test_the_estimate_is_the_integral(bent):
    """Also with an untrained encoder, whose own posterior is off by nats."""
    grid, effort = jnp.linspace(-8, 8, 20_001), Effort(20, 8, 16, 4000)

    @jax.jit
    @jax.vmap
    def run(pixels, key):
        inferred = bent.infer(key, pixels)
        log_prob, info = estimate_log_prob(inferred, effort, chunk_size=500)
        heights = jax.vmap(lambda z: inferred.log_joint(z[None]))(grid)
        return heights, (log_prob, info.standard_error), anneal_log_prob(inferred, effort)

    heights, (sampled, sampling_error), (annealed, error) = run(
        digits().test[:3], jax.random.split(jax.random.key(0), 3)
    )
    truth = logsumexp(np.float64(heights), axis=1) + math.log(float(grid[1] - grid[0]))
    assert (np.abs(sampled - truth) < 4 * sampling_error + 0.01).all()
    assert (np.abs(annealed - truth) < 4 * error + 0.05).all()


@pytest.mark.slow
def test_the_worst_are_annealed_as_far_as_the_budget_goes(bent, monkeypatch):
    """All images count as doubtful here, so the budget alone decides which are annealed."""
    monkeypatch.setattr(evaluation, "is_doubtful", lambda shapes: np.ones(len(shapes), bool))
    monkeypatch.setattr(evaluation, "pareto_k", lambda largest, _: np.arange(len(largest)))
    images = digits().test[:6]
    few = bent.with_config("evaluation", importance_samples=50, evaluation_batch=3)
    none = evaluate(few.with_config("evaluation", evaluation_budget=0.0), images).per_image
    assert not none["annealed"].any()
    # An image costs 50 samples and 164 expansions of one dimension; annealing one, 25,600.
    budget = 2.5 * ANNEALING.cost / (6 * 214)
    some = evaluate(few.with_config("evaluation", evaluation_budget=budget), images).per_image
    np.testing.assert_array_equal(some["annealed"], [False] * 4 + [True] * 2)
    np.testing.assert_array_equal(some["log_prob"][:4], none["log_prob"][:4])
    assert (some["log_prob"][4:] != none["log_prob"][4:]).all()


@pytest.mark.slow
def test_every_proposal_estimates_the_same_number(bent):
    """Proposals differ in efficiency only: with many samples in one dimension all agree."""
    images = digits().test[:2]
    found = {}
    for proposal in ("auto", "student_t", "widened"):
        changed = bent.with_config(
            "evaluation", proposal=proposal, importance_samples=20_000, proposal_df=2.0
        )
        found[proposal] = evaluate(changed, images).per_image
    error = found["student_t"]["log_prob_sampling_error"] + found["auto"]["log_prob_sampling_error"]
    difference = found["auto"]["log_prob"] - found["student_t"]["log_prob"]
    assert (np.abs(difference) < 5 * error + 0.02).all()


def test_the_budget_pays_for_the_first_images_it_can():
    assert within_budget(np.array([3, 5, 8]), 10, 25.0).tolist() == [3, 5]
    assert within_budget(np.array([3]), 10, 9.0).tolist() == []


@pytest.mark.slow
def test_another_way_to_infer_leaves_the_estimate_where_it_was(bent):
    """log p(x) depends on the decoder only: a Laplace posterior raises the ELBO and not it."""
    images = digits().test[:3]
    sampled = bent.with_config("evaluation", importance_samples=4000)
    laplace = sampled.with_inference(method="vlae", steps=20, refine="variational")
    one, other = (evaluate(each, images).per_image for each in (sampled, laplace))
    assert (other["elbo"] > one["elbo"] + 0.1).all()
    error = one["log_prob_sampling_error"] + other["log_prob_sampling_error"]
    assert (np.abs(one["log_prob"] - other["log_prob"]) < 5 * error + 0.01).all()
    assert dataclasses.asdict(laplace.config.model) == dataclasses.asdict(bent.config.model)
