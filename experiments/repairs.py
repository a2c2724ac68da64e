"""What the mistakes of the published code cost: SA-VAE and IAF with and without each, on digits.

.venv/bin/python -m experiments.repairs --jobs 2

The mistakes are made here, on purpose, as systems beside those of the package. Run with `train` as
the first argument the module is `vlae_jax` with these systems added.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.study import Study, main
from experiments.systems import ASCENT
from vlae_jax.commands import main
from vlae_jax.models import systems
from vlae_jax.models.flows import FlowPosterior

BATCH = 64


def descending() -> optax.GradientTransformation:
    """Turn the ascent around: the loss is ascended."""
    return optax.scale(-1.0)


def batch_mean() -> optax.GradientTransformation:
    """Take the gradient of the batch's mean loss, where each image's own was meant."""
    return optax.scale(1.0 / BATCH)


def inverted_clip(clip: float) -> optax.GradientTransformation:
    """Divide by the square of the norm: the longer the gradient, the shorter the step."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        square = optax.tree.norm(grads) ** 2
        scale = jnp.where(square > clip, clip / square, 1.0)
        return jax.tree.map(lambda grad: scale * grad, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _wrong_ascent(mistakes: tuple[optax.GradientTransformation, ...]) -> systems.SystemSpec:
    def build(config: Any) -> systems.System:
        optimizer = optax.chain(*mistakes, systems.ascent_optimizer(config))
        return functools.partial(systems.semi_amortized_vae, config=config, optimizer=optimizer)

    return systems.SystemSpec(build)


def blind_flow_vae(model: Any, x: Any, key: Any) -> systems.Inference:
    """An autoregressive flow whose masks shut the context out: one map for all images."""
    inference = systems.flow_vae(model, x, key)
    blind = jnp.zeros_like(inference.posterior.context)
    posterior = inference.posterior._replace(context=blind)
    assert isinstance(posterior, FlowPosterior)
    return inference._replace(posterior=posterior)


CLIP = 5.0
WRONG = {
    "sa_vae_descending": _wrong_ascent((descending(),)),
    "sa_vae_batch_mean": _wrong_ascent((batch_mean(),)),
    "sa_vae_inverted_clip": _wrong_ascent((inverted_clip(CLIP),)),
    "sa_vae_all_three": _wrong_ascent((batch_mean(), inverted_clip(CLIP), descending())),
    "vae_iaf_blind": systems.SYSTEMS["vae_iaf"]._replace(build=lambda config: blind_flow_vae),
}

STUDY = Study(
    "repairs",
    "what the published mistakes cost",
    {
        "VAE": ["--method", "vae"],
        "SA-VAE": ["--method", "sa_vae", *ASCENT],
        "SA-VAE, clipped at 5": ["--method", "sa_vae", *ASCENT, "--ascent-clip", "5"],
        "SA-VAE, descending": ["--method", "sa_vae_descending", *ASCENT],
        "SA-VAE, rate over the batch": ["--method", "sa_vae_batch_mean", *ASCENT],
        "SA-VAE, clip inverted": ["--method", "sa_vae_inverted_clip", *ASCENT],
        "SA-VAE, all three": ["--method", "sa_vae_all_three", *ASCENT],
        "VAE+IAF": ["--method", "vae_iaf"],
        "VAE+IAF, blind to the image": ["--method", "vae_iaf_blind"],
    },
    [
        *("--dataset", "digits", "--steps", "4", "--epochs", "1000", "--patience", "60"),
        *("--batch-size", str(BATCH), "--log-every", "1000"),
    ],
    seeds=(0, 1, 2, 3, 4),
    command=("-m", "experiments.repairs", "train"),
)

if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        systems.SYSTEMS.update(WRONG)
        cli.main(sys.argv[1:])
    else:
        main(STUDY)
