"""Proposals for importance sampling: posteriors with heavier tails, skewed ones, and mixtures."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.densities import LogDensity
from vlae_jax.posterior import (
    DiagonalPosterior,
    EvaluablePosterior,
    GaussianPosterior,
    SymmetricPosterior,
    as_gaussian,
    require_symmetric,
    solve_factor,
)

_FEW_DF = 16


class StudentTPosterior(NamedTuple):
    """A multivariate Student-t: a proposal with heavier tails than a Gaussian."""

    mean: Float[Array, " latent"]
    chol_precision: Float[Array, "latent latent"]
    """Lower triangular L; L Lᵀ is the inverse of the scale matrix."""
    df: float | Float[Array, ""]
    """Degrees of freedom ν, positive. The covariance is ν / (ν - 2) times the scale matrix, for
    ν > 2."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw z = mean + L⁻ᵀε / √(g / ν), g from χ²(ν), (latent,), and its log density in nats.

        Gradients:
            Flow through mean and factor (reparameterization), and implicitly through ν.
        """
        normal_key, chi_square_key = jax.random.split(key)
        noise = jax.random.normal(normal_key, self.mean.shape, self.mean.dtype)
        noise = noise / jnp.sqrt(_chi_square(chi_square_key, self.df, noise.dtype) / self.df)
        z = self.mean + solve_factor(self.chol_precision, noise, transpose=True)
        return z, self._log_density(noise @ noise)

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats."""
        whitened = self.chol_precision.T @ (z - self.mean)
        return self._log_density(whitened @ whitened)

    def reflect(self, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """The mirror image 2 mean - z of `z`, (latent,)."""
        return 2 * self.mean - z

    def _log_density(self, square: Float[Array, ""]) -> Float[Array, ""]:
        df, dim = self.df, self.mean.size
        log_det_chol = jnp.sum(jnp.log(jnp.diagonal(self.chol_precision)))
        # Of a plain number the compiler need not know what the function is.
        log_gamma = math.lgamma if isinstance(df, int | float) else gammaln
        log_peak = log_gamma(0.5 * (df + dim)) - log_gamma(0.5 * df)
        log_peak -= 0.5 * dim * jnp.log(df * math.pi)
        return log_det_chol + log_peak - 0.5 * (df + dim) * jnp.log1p(square / df)


def _chi_square(key: PRNGKeyArray, df: float | Array, dtype: Any) -> Float[Array, ""]:
    """Draw from χ²(df).

    A few whole degrees of freedom are as many squared normals. The general sampler rejects, in
    loops that take seconds to compile.
    """
    if isinstance(df, int | float) and df in range(1, _FEW_DF + 1):
        return jnp.sum(jax.random.normal(key, (int(df),), dtype) ** 2)
    return 2 * jax.random.gamma(key, jnp.asarray(0.5 * df, dtype), dtype=dtype)


class SkewedPosterior(NamedTuple):
    """A symmetric posterior q, skewed by choosing between each sample and its mirror image.

    z ~ q is kept with probability p(x, z) / (p(x, z) + p(x, z̄)), z̄ its mirror image, and replaced
    by z̄ otherwise: the density is 2 q(z) times that probability. This needs a second evaluation of
    the log joint, and no derivative. The log joint minus the log density of a sample is the log of
    the mean importance weight of the pair under q. So the ELBO is the two-sample antithetic
    importance-weighted bound of q, and never below the ELBO of q.

    References:
        Pozza, Durante and Szabo (2024), Skew-symmetric approximations of posterior distributions.
    """

    base: SymmetricPosterior
    """The symmetric q: Gaussian, diagonal or Student-t."""
    log_joint: LogDensity
    """z of shape (latent,) → log p(x, z), nats. A plain function works within one trace; to pass
    the posterior through `jit` or `vmap`, wrap the function in a `jax.tree_util.Partial`."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw one sample, (latent,), with its log density in nats, by two log-joint evaluations.

        Raises:
            ValueError: While tracing, if the base is not symmetric.

        Gradients:
            Flow along the path of the chosen sample. The choice itself is held constant, so
            averages over samples have biased gradients. To train on the ELBO, differentiate
            `iwae_bound(..., num_samples=2, antithetic=True)` of the base, which has the same
            expectation and an unbiased gradient.
        """
        base = require_symmetric(self.base, "a skewed posterior")
        base_key, choice_key = jax.random.split(key)
        z, log_q = base.sample_and_log_prob(base_key)
        mirrored = base.reflect(z)
        advantage = self._advantage(z, mirrored)
        is_kept = jax.random.bernoulli(choice_key, jax.nn.sigmoid(advantage))
        log_share = jax.nn.log_sigmoid(jnp.where(is_kept, advantage, -advantage))
        return jnp.where(is_kept, z, mirrored), math.log(2) + log_q + log_share

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats, by two evaluations of the log joint."""
        base = require_symmetric(self.base, "a skewed posterior")
        advantage = self._advantage(z, base.reflect(z))
        return math.log(2) + base.log_prob(z) + jax.nn.log_sigmoid(advantage)

    def _advantage(
        self, z: Float[Array, " latent"], mirrored: Float[Array, " latent"]
    ) -> Float[Array, ""]:
        """Log p(x, z) - log p(x, z̄); 0 where both are impossible."""
        here, there = jax.vmap(self.log_joint)(jnp.stack([z, mirrored]))
        is_nowhere = (here == -jnp.inf) & (there == -jnp.inf)
        return jnp.where(is_nowhere, 0.0, here - there)


class MixturePosterior(NamedTuple):
    """A mixture of posteriors, as a proposal for several modes or with a wide extra component."""

    components: tuple[EvaluablePosterior, ...]
    """Gaussians, Student-t or any others with `log_prob`, all over the same z."""
    log_weights: Float[Array, " component"]
    """Log weights of the components; they need not be normalized."""
    center: Float[Array, " latent"] | None = None
    """Common mean, (latent,), that replaces those of the components, or None. It makes the mixture
    symmetric, for antithetic estimates, and needs components with a field `mean`."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw a component and z, (latent,), from it, with the mixture's log density in nats.

        Every component is sampled and evaluated, so the cost is proportional to their number.

        Raises:
            ValueError: While tracing, if components and weights do not fit together.

        Gradients:
            Flow along the path of the chosen component and through all densities. The choice is
            held constant: averages over samples have the correct gradient with respect to the
            components, and a biased one with respect to the weights.
        """
        choice_key, key = jax.random.split(key)
        zs = [component.sample_and_log_prob(key)[0] for component in self._placed()]
        z = jnp.stack(zs)[jax.random.categorical(choice_key, self.log_weights)]
        return z, self.log_prob(z)

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density of the mixture at `z`, (latent,), in nats."""
        log_probs = jnp.stack([component.log_prob(z) for component in self._placed()])
        return jax.nn.logsumexp(jax.nn.log_softmax(self.log_weights) + log_probs)

    def reflect(self, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """The mirror image 2 center - z of `z`, (latent,).

        Raises:
            ValueError: While tracing, if the mixture has no center that its components share.
        """
        if self.center is None:
            raise ValueError(
                "a MixturePosterior is symmetric only about a `center` that its components share; "
                "give it, or use antithetic=False"
            )
        return 2 * self.center - z

    def _placed(self) -> list[Any]:
        """The components, moved to the center if there is one."""
        components = list(self.components)
        if not components or self.log_weights.shape != (len(components),):
            raise ValueError(
                "a MixturePosterior needs at least one component and a log weight for each, got "
                f"{len(components)} components and log weights of shape {self.log_weights.shape}"
            )
        if self.center is None:
            return components
        return [self._at_center(component) for component in components]

    def _at_center(self, component: Any) -> Any:
        has_mean = isinstance(component, SymmetricPosterior) and hasattr(component, "mean")
        if not has_mean:
            raise ValueError(
                "a MixturePosterior with a `center` needs components that are symmetric about "
                f"their `mean`; {type(component).__name__} is not"
            )
        return component._replace(mean=self.center)


def widened(
    posterior: GaussianPosterior | DiagonalPosterior, scale: float
) -> GaussianPosterior | DiagonalPosterior:
    """Multiply every standard deviation of a Gaussian by `scale`, for proposals.

    Args:
        posterior: A Gaussian.
        scale: A positive factor; above 1 for importance sampling, for example 1.2.
    """
    if isinstance(posterior, DiagonalPosterior):
        return posterior._replace(log_std=posterior.log_std + math.log(scale))
    return posterior._replace(chol_precision=posterior.chol_precision / scale)


def heavy_tailed(posterior: GaussianPosterior | DiagonalPosterior, df: float) -> StudentTPosterior:
    """Convert a Gaussian to the Student-t with its mean and scale matrix, for proposals.

    Args:
        posterior: A Gaussian.
        df: Degrees of freedom ν, positive; for example 5. Smaller values give heavier tails.
    """
    return StudentTPosterior(*as_gaussian(posterior), df)
