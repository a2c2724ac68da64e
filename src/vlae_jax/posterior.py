"""Posteriors over the latent of one example: their protocols, Gaussians, and proposals."""

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.densities import LogDensity, standard_normal
from vlae_jax.expansions import Expansion
from vlae_jax.factor import Factor, factorize

LOG_2PI = math.log(2 * math.pi)


@runtime_checkable
class Posterior(Protocol):
    """Protocol of every approximate posterior q(z | x): the method that the bounds require."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw one reparameterized sample, (latent,), with its log density in nats."""
        ...


@runtime_checkable
class EvaluablePosterior(Posterior, Protocol):
    """Protocol of a posterior that can also evaluate its density at any point."""

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats."""
        ...


@runtime_checkable
class SymmetricPosterior(EvaluablePosterior, Protocol):
    """Protocol of a posterior whose density is symmetric about a center, for antithetic pairs."""

    def reflect(self, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """The mirror image 2 center - z of `z`, (latent,), which has the density of `z`."""
        ...


@runtime_checkable
class ClosedFormPosterior(EvaluablePosterior, Protocol):
    """Protocol of a posterior with moments and KL divergence in closed form: the Gaussians."""

    mean: Float[Array, " latent"]

    def kl_to_standard_normal(self) -> Float[Array, ""]:
        """KL(q ‖ N(0, I)), nats."""
        ...

    def covariance(self) -> Float[Array, "latent latent"]:
        """The covariance, (latent, latent)."""
        ...


def require_symmetric(posterior: Posterior, purpose: str) -> SymmetricPosterior:
    """Check that a posterior is symmetric and return it.

    Raises:
        ValueError: While tracing, if the posterior has no `reflect`.
    """
    if not isinstance(posterior, SymmetricPosterior):
        raise ValueError(
            f"{purpose} needs a posterior that is symmetric about a center, with `log_prob` and "
            f"`reflect`, as Gaussians and Student-t have; {type(posterior).__name__} is not"
        )
    return posterior


def kl_to_standard_normal(
    key: PRNGKeyArray, posterior: Posterior, *, num_samples: int
) -> Float[Array, ""]:
    """KL(q ‖ N(0, I)), nats: in closed form where there is one, otherwise a mean over samples.

    Args:
        key: Random key; unused where there is a closed form.
        posterior: q.
        num_samples: Samples averaged.
    """
    if isinstance(posterior, ClosedFormPosterior):
        return posterior.kl_to_standard_normal()
    zs, log_q = jax.vmap(posterior.sample_and_log_prob)(jax.random.split(key, num_samples))
    return jnp.mean(log_q - jax.vmap(standard_normal)(zs))


def mean_and_covariance(
    key: PRNGKeyArray, posterior: Posterior, *, num_samples: int
) -> tuple[Float[Array, " latent"], Float[Array, "latent latent"]]:
    """Mean (latent,) and covariance (latent, latent) of q: exact where known, else over samples.

    Args:
        key: Random key; unused where the moments are known.
        posterior: q.
        num_samples: Samples averaged; at least 2.
    """
    if isinstance(posterior, ClosedFormPosterior):
        return posterior.mean, posterior.covariance()
    zs, _ = jax.vmap(posterior.sample_and_log_prob)(jax.random.split(key, num_samples))
    return jnp.mean(zs, axis=0), jnp.cov(zs, rowvar=False).reshape(zs.shape[1], zs.shape[1])


class GaussianPosterior(NamedTuple):
    """The Gaussian N(mean, precision⁻¹), its full precision stored as a Cholesky factor."""

    mean: Float[Array, " latent"]
    chol_precision: Float[Array, "latent latent"]
    """Lower L with precision = L Lᵀ."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw z = mean + L⁻ᵀε; under `vmap` over keys all samples share one triangular solve.

        Returns:
            The sample, (latent,), and its log density in nats.

        Gradients:
            Flow through mean and factor (reparameterization). The log density is computed from ε,
            so it has the gradient of the entropy and no score term.
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        z = self.mean + _solve(self.chol_precision, noise, transpose=True)
        return z, self._log_normalizer() - 0.5 * noise @ noise

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats."""
        whitened = self.chol_precision.T @ (z - self.mean)
        return self._log_normalizer() - 0.5 * whitened @ whitened

    def reflect(self, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """The mirror image 2 mean - z of `z`, (latent,)."""
        return 2 * self.mean - z

    def entropy(self) -> Float[Array, ""]:
        """Differential entropy, nats."""
        return 0.5 * self.mean.size - self._log_normalizer()

    def kl_to_standard_normal(self) -> Float[Array, ""]:
        """KL(q ‖ N(0, I)) in closed form, nats."""
        scale = self._scale_t()
        trace = jnp.sum(scale**2)
        return -self.entropy() + 0.5 * (trace + self.mean @ self.mean + self.mean.size * LOG_2PI)

    def covariance(self) -> Float[Array, "latent latent"]:
        """The covariance L⁻ᵀL⁻¹, for inspection."""
        scale = self._scale_t()
        return scale.T @ scale

    def _scale_t(self) -> Float[Array, "latent latent"]:
        identity = jnp.eye(self.mean.size, dtype=self.chol_precision.dtype)
        return _solve(self.chol_precision, identity)

    def _log_normalizer(self) -> Float[Array, ""]:
        log_det_chol = jnp.sum(jnp.log(jnp.diagonal(self.chol_precision)))
        return log_det_chol - 0.5 * self.mean.size * LOG_2PI


class DiagonalPosterior(NamedTuple):
    """N(mean, diag(exp(log_std))²): the amortized posterior of a plain VAE."""

    mean: Float[Array, " latent"]
    log_std: Float[Array, " latent"]

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw z = mean + std ε, (latent,), with its log density in nats; reparameterized."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        z = self.mean + jnp.exp(self.log_std) * noise
        return z, self._log_normalizer() - 0.5 * noise @ noise

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats."""
        whitened = (z - self.mean) * jnp.exp(-self.log_std)
        return self._log_normalizer() - 0.5 * whitened @ whitened

    def reflect(self, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """The mirror image 2 mean - z of `z`, (latent,)."""
        return 2 * self.mean - z

    def entropy(self) -> Float[Array, ""]:
        """Differential entropy, nats."""
        return 0.5 * self.mean.size - self._log_normalizer()

    def kl_to_standard_normal(self) -> Float[Array, ""]:
        """KL(q ‖ N(0, I)) in closed form, nats."""
        trace = jnp.sum(jnp.exp(2 * self.log_std))
        return -self.entropy() + 0.5 * (trace + self.mean @ self.mean + self.mean.size * LOG_2PI)

    def covariance(self) -> Float[Array, "latent latent"]:
        """The covariance, a diagonal matrix, for inspection."""
        return jnp.diag(jnp.exp(2 * self.log_std))

    def _log_normalizer(self) -> Float[Array, ""]:
        return -jnp.sum(self.log_std) - 0.5 * self.mean.size * LOG_2PI


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
        normal_key, gamma_key = jax.random.split(key)
        noise = jax.random.normal(normal_key, self.mean.shape, self.mean.dtype)
        half_df = jnp.asarray(0.5 * self.df, self.mean.dtype)
        divisor = jax.random.gamma(gamma_key, half_df, dtype=noise.dtype) / half_df
        noise = noise / jnp.sqrt(divisor)
        z = self.mean + _solve(self.chol_precision, noise, transpose=True)
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
        log_peak = gammaln(0.5 * (df + dim)) - gammaln(0.5 * df)
        log_peak -= 0.5 * dim * jnp.log(df * math.pi)
        return log_det_chol + log_peak - 0.5 * (df + dim) * jnp.log1p(square / df)


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


def as_gaussian(posterior: GaussianPosterior | DiagonalPosterior) -> GaussianPosterior:
    """Convert a Gaussian to the form with the Cholesky factor of its precision."""
    if isinstance(posterior, DiagonalPosterior):
        return GaussianPosterior(posterior.mean, jnp.diag(jnp.exp(-posterior.log_std)))
    return posterior


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


def laplace_posterior(
    expand: Expansion, mode: Float[Array, " latent"], *, repair: Expansion | None = None
) -> GaussianPosterior:
    """The Laplace approximation N(mode, precision⁻¹), the precision taken from `expand` at `mode`.

    Args:
        expand: Expansion of one example's log joint.
        mode: The point of expansion, shape (latent,); normally from `newton_refine`.
        repair: Expansion whose precision replaces one that is not positive definite; for example
            `gauss_newton_expansion`.

    Returns:
        The posterior. Where the precision is not positive definite and not repaired, the factor
        is NaN, for this example alone.

    Gradients:
        Flow into the mean, and through the precision into `mode` and the parameters. A NaN factor
        contributes none.

    References:
        Park, Kim and Kim (2019), equation 12; Tierney and Kadane (1986).
    """
    _, factor = factorize(expand, mode, repair)
    return posterior_from_factor(mode, factor)


def posterior_from_factor(mode: Float[Array, " latent"], factor: Factor) -> GaussianPosterior:
    """N(mode, precision⁻¹); the factor is NaN where the factorization failed, to show it."""
    return GaussianPosterior(mode, jnp.where(factor.is_finite, factor.chol, jnp.nan))


def _solve(
    chol: Float[Array, "latent latent"], rhs: Float[Array, "latent ..."], *, transpose: bool = False
) -> Float[Array, "latent ..."]:
    return solve_triangular(chol, rhs, lower=True, trans=1 if transpose else 0)
