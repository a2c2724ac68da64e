"""The training objective of one example, and the loss of a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray

from vlae_jax.bounds import elbo, iwae_bound
from vlae_jax.models.trained import Inferred, Trained


def objective(
    inferred: Inferred, *, kind: str = "elbo", num_samples: int = 1
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the objective that training maximizes for one example, and metrics, all in nats.

    The objective is a bound or an estimate of log p(x), minus the system's amortization loss. The
    metrics are the ELBO, KL(q ‖ p) and their sum, the expected reconstruction log-likelihood; the
    amortization loss and the system's flags as numbers; and, with `kind` other than "elbo", the
    bound or estimate itself as "objective".

    Args:
        inferred: The result of `Trained.infer`.
        kind: "elbo", "iwae", "dreg" or "evidence".
        num_samples: Number of posterior samples.
    """
    keys, inference = inferred.keys, inferred.inference
    log_joint, posterior = inferred.log_joint, inferred.posterior
    constant = jax.lax.stop_gradient(posterior)
    if kind == "elbo":
        value = bound = elbo(keys.bound, log_joint, posterior, num_samples=num_samples)
    else:
        if kind == "evidence":
            # At a mode the Laplace evidence is log p(x, z) - log q(z).
            mode = posterior.mean  # type: ignore[attr-defined]
            value = log_joint(mode) - posterior.log_prob(mode)  # type: ignore[attr-defined]
        else:
            value = iwae_bound(
                keys.bound,
                log_joint,
                posterior,
                num_samples=num_samples,
                doubly_reparameterized=kind == "dreg",
            )
        bound = jax.lax.stop_gradient(
            elbo(keys.bound, log_joint, constant, num_samples=num_samples)
        )
    kl = inferred.at.kl_to_prior(keys.divergence, constant, num_samples=num_samples)
    metrics = {
        "elbo": bound,
        "kl": kl,
        "reconstruction": bound + kl,
        "amortization_loss": inference.amortization_loss,
        **({} if kind == "elbo" else {"objective": value}),
        **{name: flag.astype(bound.dtype) for name, flag in inference.flags.items()},
    }
    return value - inference.amortization_loss, metrics


class Aside(NamedTuple):
    """What a batch shows besides its loss."""

    metrics: dict[str, Float[Array, ""]]
    """Means over the batch; see `objective`."""
    modes: Float[Array, "batch latent"]
    """Where the search of each image ended."""


def loss_fn(
    params: Any,
    model: Trained,
    pixels: Num[Array, "batch ..."],
    keys: PRNGKeyArray,
    starts: Float[Array, "batch latent"] | None = None,
) -> tuple[Float[Array, ""], Aside]:
    """Return minus the batch mean of the objective, nats per image, and what else it shows.

    Args:
        params: Parameters to differentiate with respect to; they replace those of `model`.
        model: The model that the parameters belong to.
        pixels: The images of a batch.
        keys: Random keys, one per image.
        starts: Where the search for each image may start, and NaN where that is not known: by
            default at the encoder's mean; see `Trained.infer`.
    """
    training = model.config.training
    current = model.with_params(params)

    def one(key: PRNGKeyArray, image: Array, start: Array | None) -> tuple[Array, Aside]:
        inferred = current.infer(key, image, start=start, training=True).in_training()
        value, metrics = objective(
            inferred, kind=training.objective, num_samples=training.train_samples
        )
        return value, Aside(metrics, inferred.inference.iterates[-1])

    values, (metrics, modes) = jax.vmap(one)(keys, pixels, starts)
    return -jnp.mean(values), Aside(jax.tree.map(jnp.mean, metrics), modes)
