"""Posteriors over the latent of one example: what they can do, the Gaussian ones, and proposals."""

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
    """What every approximate posterior q(z | x) can do: all that the bounds ask for."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """One reparameterized sample, (latent,), and its log density in nats."""
        ...


@runtime_checkable
class EvaluablePosterior(Posterior, Protocol):
    """One that also has its density at points that it did not draw."""

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats."""
        ...


@runtime_checkable
class SymmetricPosterior(EvaluablePosterior, Protocol):
    """One whose density is the same on both sides of a center: samples come with their mirror."""

    def reflect(self, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """The mirror image 2 center - z of `z`, (latent,), where the density is that of `z`."""
        ...


@runtime_checkable
class ClosedFormPosterior(EvaluablePosterior, Protocol):
    """One whose moments and divergence need no samples: the Gaussians."""

    mean: Float[Array, " latent"]

    def kl_to_standard_normal(self) -> Float[Array, ""]:
        """KL(q ‖ N(0, I)), nats."""
        ...

    def covariance(self) -> Float[Array, "latent latent"]:
        """The covariance, (latent, latent)."""
        ...


def require_symmetric(posterior: Posterior, purpose: str) -> SymmetricPosterior:
    """The same posterior.

    Raises:
        ValueError: While tracing, if it has no `reflect`.
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
    """KL(q ‖ N(0, I)), nats: in closed form where there is one, else the mean over samples.

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
    """The moments of q: (latent,) and (latent, latent), exact where known, else over samples.

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
    """N(mean, precision⁻¹) with the full precision held as its Cholesky factor, never inverted."""

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
            Flow through mean and factor (reparameterization). The log density is written in ε, so
            it carries the gradient of the entropy and no score.
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
    """A multivariate Student-t: a proposal whose tails a Gaussian's weights cannot outrun."""

    mean: Float[Array, " latent"]
    chol_precision: Float[Array, "latent latent"]
    """Lower L; L Lᵀ is the inverse of the scale matrix, as a Gaussian's precision is."""
    df: float | Float[Array, ""]
    """Degrees of freedom ν, positive. The covariance is ν / (ν - 2) times the scale matrix, for
    ν > 2."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw mean + L⁻ᵀε / √(g / ν), g from χ²(ν): (latent,), and its log density in nats.

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
    """A symmetric posterior q with each sample moved to its mirror image where that is likelier.

    z ~ q is kept with probability p(x, z) / (p(x, z) + p(x, z̄)), z̄ its mirror image, and z̄ taken
    otherwise: the density is 2 q(z) times that probability. It needs no derivative of the log
    joint, at the price of a second evaluation. Every sample's log p(x, z) - log q(z) is the log of
    the mean weight of the pair under q, so its ELBO is the two-sample antithetic
    importance-weighted bound of q: never below the ELBO of q.

    References:
        Pozza, Durante and Szabo (2024), Skew-symmetric approximations of posterior distributions.
    """

    base: SymmetricPosterior
    """q: Gaussian, diagonal or Student-t."""
    log_joint: LogDensity
    """z of shape (latent,) → log p(x, z), nats. A plain function serves within one trace; to pass
    the posterior through `jit` or `vmap`, give a `jax.tree_util.Partial` of one."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """One sample, (latent,), and its log density in nats; two evaluations of the log joint.

        Raises:
            ValueError: While tracing, if the base is not symmetric.

        Gradients:
            Those along the path of the sample chosen; the choice itself is held constant, so
            averages over samples have biased gradients. To train on the ELBO, differentiate
            `iwae_bound(..., num_samples=2, antithetic=True)` of the base: the same number, its
            gradient unbiased.
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
        """Log density at `z`, (latent,), in nats; two evaluations of the log joint."""
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
    """Several posteriors at once: a proposal for several modes, or one with a wide reserve."""

    components: tuple[EvaluablePosterior, ...]
    """Gaussians, Student-t or any others with `log_prob`, of one shape of z."""
    log_weights: Float[Array, " component"]
    """Log weights of the components; they need not be normalized."""
    center: Float[Array, " latent"] | None = None
    """Where given, (latent,), every component is moved there, which makes the mixture symmetric
    and fit for antithetic estimates. Needs components with a field `mean`."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw a component, and z from it: (latent,), with the mixture's log density in nats.

        Every component is drawn from, and evaluated: their number multiplies the cost.

        Raises:
            ValueError: While tracing, if components and weights do not fit together.

        Gradients:
            Flow along the path of the component chosen and through all densities. The choice is
            held constant: averages over samples have the right gradient with respect to the
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
        """The components where they are, or at the center."""
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
    """The same Gaussian, held by the Cholesky factor of its precision."""
    if isinstance(posterior, DiagonalPosterior):
        return GaussianPosterior(posterior.mean, jnp.diag(jnp.exp(-posterior.log_std)))
    return posterior


def widened(
    posterior: GaussianPosterior | DiagonalPosterior, scale: float
) -> GaussianPosterior | DiagonalPosterior:
    """The same Gaussian with every standard deviation times `scale`, for proposals.

    Args:
        posterior: A Gaussian.
        scale: Positive; above 1 for importance sampling, 1.2 say.
    """
    if isinstance(posterior, DiagonalPosterior):
        return posterior._replace(log_std=posterior.log_std + math.log(scale))
    return posterior._replace(chol_precision=posterior.chol_precision / scale)


def heavy_tailed(posterior: GaussianPosterior | DiagonalPosterior, df: float) -> StudentTPosterior:
    """The Student-t of the same mean and scale, for proposals.

    Args:
        posterior: A Gaussian.
        df: Degrees of freedom ν, positive; 5 say. Small values have wide tails.
    """
    return StudentTPosterior(*as_gaussian(posterior), df)


def laplace_posterior(
    expand: Expansion, mode: Float[Array, " latent"], *, repair: Expansion | None = None
) -> GaussianPosterior:
    """The Laplace approximation N(mode, precision⁻¹), the precision taken from `expand` at `mode`.

    Args:
        expand: Expansion of one example's log joint.
        mode: Where to expand; normally from `newton_refine`. Shape (latent,).
        repair: Expansion whose precision replaces one that is not positive definite
            (`gauss_newton_expansion`, say).

    Returns:
        The posterior. Where the precision is not positive definite and not repaired, the factor
        is NaN, for this example alone.

    Gradients:
        Flow into the mean, and through the precision into `mode` and the parameters. None come
        from a NaN factor.

    References:
        Park, Kim and Kim (2019), equation 12; Tierney and Kadane (1986).
    """
    _, factor = factorize(expand, mode, repair)
    return posterior_from_factor(mode, factor)


def posterior_from_factor(mode: Float[Array, " latent"], factor: Factor) -> GaussianPosterior:
    """N(mode, precision⁻¹), its factor NaN where there is none: a failure stays visible."""
    return GaussianPosterior(mode, jnp.where(factor.is_finite, factor.chol, jnp.nan))


def _solve(
    chol: Float[Array, "latent latent"], rhs: Float[Array, "latent ..."], *, transpose: bool = False
) -> Float[Array, "latent ..."]:
    return solve_triangular(chol, rhs, lower=True, trans=1 if transpose else 0)
