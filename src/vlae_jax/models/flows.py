"""Normalizing flows that transform an amortized posterior, one example at a time (Flax NNX).

A flow is an invertible map of z with the log determinant of its Jacobian, from which the density of
its output follows. Its context is the encoder's last hidden layer.

`arithmetic=` sets how the networks inside a flow multiply. For any output of these networks,
rounded to bfloat16 or not, the map is invertible and its log determinant is correct.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.models.arithmetic import FULL, Arithmetic
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior, Posterior

# A tenth of the scale that keeps the variance, so that networks start with small, nonzero outputs.
_QUIET = nnx.initializers.variance_scaling(0.01, "fan_in", "normal")
_LOUD = nnx.initializers.lecun_normal()
# The gate starts at σ(2) = 0.88: a step of the autoregressive flow keeps most of z at first.
_OPEN_GATE = 2.0


class Flow(Protocol):
    """Protocol of an `nnx.Module` that maps z, invertibly for every context."""

    context_size: int

    def __call__(
        self, z: Float[Array, " latent"], context: Float[Array, " context"]
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Return the new z, (latent,), and log|det ∂z_new/∂z|, nats."""
        ...


class FlowPosterior(NamedTuple):
    """The distribution of samples of a simpler posterior after a flow has mapped them.

    It is a pytree whose leaves include the flow's weights, and a `vmap` that returns it copies them
    for every example. Return values computed from it instead.
    """

    base: Posterior
    context: Float[Array, " context"]
    flow: Flow

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw from the base and map the sample: log q(z) = log q_base - log|det|.

        Returns:
            The sample, (latent,), and its log density in nats.

        Gradients:
            Flow through base, context and the flow's weights (reparameterization).

        References:
            Rezende and Mohamed (2015), Variational inference with normalizing flows, equation 7.
        """
        z, log_prob = self.base.sample_and_log_prob(key)
        z, log_det = self.flow(z, self.context)
        return z, log_prob - log_det


class HouseholderFlow(nnx.Module):
    """Reflections z - 2 v vᵀz / |v|²: an orthogonal matrix that depends on the context.

    The first v is affine in the context, each later one in the v before. A diagonal Gaussian stays
    Gaussian, with a full covariance of the same eigenvalues: see `householder_posterior`. Initially
    the matrix is almost equal for all examples, and the prior N(0, I) is invariant under it.

    Args:
        latent: Dimensions of z.
        hidden: Size of the context.
        num_steps: Number of reflections.
        arithmetic: The functions by which layers multiply.
        rngs: Random streams for the initial weights.

    Raises:
        ValueError: If there are no steps; when called, if a shape is not that of one example.

    References:
        Tomczak and Welling (2016), Improving variational auto-encoders using Householder flow.
    """

    def __init__(
        self,
        latent: int,
        hidden: int,
        num_steps: int,
        *,
        arithmetic: Arithmetic = FULL,
        rngs: nnx.Rngs,
    ) -> None:
        _require_steps(num_steps)
        dot = arithmetic.dot_general
        self.latent, self.context_size = latent, hidden
        # The bias gives v a direction; without it the direction would depend on the context alone,
        # however small.
        somewhere = nnx.initializers.normal(1.0)
        self.first = nnx.Linear(
            hidden, latent, kernel_init=_QUIET, bias_init=somewhere, dot_general=dot, rngs=rngs
        )
        self.later = nnx.List(
            nnx.Linear(latent, latent, dot_general=dot, rngs=rngs) for _ in range(num_steps - 1)
        )

    def vectors(self, context: Float[Array, " context"]) -> Float[Array, "steps latent"]:
        """The vectors v that the steps reflect along, in order; not normalized."""
        vectors = [self.first(context)]
        for layer in self.later:
            vectors.append(layer(vectors[-1]))
        return jnp.stack(vectors)

    def __call__(
        self, z: Float[Array, " latent"], context: Float[Array, " context"]
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Return the reflected z, (latent,), and log|det| = 0. A zero v leaves z unchanged."""
        _require_one_example(self.latent, self.context_size, z, context)
        z = _reflect(self.vectors(context), z)
        return z, jnp.zeros((), z.dtype)


def householder_posterior(
    base: DiagonalPosterior, vectors: Float[Array, "steps latent"]
) -> GaussianPosterior:
    """Return the Gaussian that a `HouseholderFlow` maps a diagonal Gaussian to.

    Its KL divergence has a closed form. With H the product of the reflections the precision is
    A Aᵀ, A = H diag(1/std), and its Cholesky factor comes from a QR decomposition of Aᵀ, which
    avoids squaring the condition number.

    Args:
        base: The diagonal Gaussian.
        vectors: `flow.vectors(context)`, (steps, latent).

    Returns:
        The posterior with the density of the flow's samples. For a given key its sample differs
        from that of the flow.

    Gradients:
        Flow through base and vectors.
    """
    scaled = jnp.diag(jnp.exp(-base.log_std))
    factor_t = jax.vmap(_reflect, in_axes=(None, 0))(vectors, scaled)
    upper = jnp.linalg.qr(factor_t, mode="r")
    chol = upper.T * jnp.sign(jnp.diagonal(upper))
    return GaussianPosterior(_reflect(vectors, base.mean), chol)


class InverseAutoregressiveFlow(nnx.Module):
    """Gated steps z ← σ(s) z + σ(-s) m, where m and s of a dimension depend on those before it.

    Each step has its own masked autoregressive network; the order of the dimensions alternates
    between forwards and backwards. The context enters all hidden units, and m and s of every
    dimension depend on it, also for the first, which depends on no other dimension.

    Args:
        latent: Dimensions of z.
        hidden: Size of the context.
        num_steps: Number of steps.
        arithmetic: The functions by which layers multiply.
        width: Units of a hidden layer, at least `latent`, so that each degree has a unit.
        depth: Number of hidden layers of a network.
        rngs: Random streams for the initial weights.

    Raises:
        ValueError: If there are no steps or no layers, or too few units; when called, if a shape is
            not that of one example.

    References:
        Kingma et al. (2016), Improved variational inference with inverse autoregressive flow,
        equations 13 and 14; Germain et al. (2015), MADE, for the masks.
    """

    def __init__(
        self,
        latent: int,
        hidden: int,
        num_steps: int,
        *,
        width: int,
        depth: int = 1,
        arithmetic: Arithmetic = FULL,
        rngs: nnx.Rngs,
    ) -> None:
        _require_steps(num_steps)
        if width < latent or depth < 1:
            raise ValueError(
                "width must be at least latent, or dimensions lose sight of others, and depth at "
                f"least 1, got {width=}, {latent=}, {depth=}"
            )
        self.latent, self.context_size = latent, hidden
        forwards = range(1, latent + 1)
        self.steps = nnx.List(
            GatedAutoregressiveStep(order, hidden, width, depth, arithmetic=arithmetic, rngs=rngs)
            for order in (forwards[:: (-1) ** step] for step in range(num_steps))
        )

    def __call__(
        self, z: Float[Array, " latent"], context: Float[Array, " context"]
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Return the new z, (latent,), and log|det ∂z_new/∂z|, nats: the sum of all log σ(s)."""
        _require_one_example(self.latent, self.context_size, z, context)
        log_det = jnp.zeros((), z.dtype)
        for step in self.steps:
            shift, gate = step.shift_and_gate(z, context)
            z = jax.nn.sigmoid(gate) * z + jax.nn.sigmoid(-gate) * shift
            log_det += jnp.sum(jax.nn.log_sigmoid(gate))
        return z, log_det


class GatedAutoregressiveStep(nnx.Module):
    """The network of one step; a hidden unit of degree k ≥ 0 depends on the first k dimensions.

    Args:
        order: The place of each dimension, 1 to latent; its m and s depend on those in earlier
            places.
        hidden: Size of the context.
        width: Units of a hidden layer; their degrees cycle through 0 to latent - 1.
        depth: Number of hidden layers.
        arithmetic: The functions by which layers multiply.
        rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        order: Sequence[int],
        hidden: int,
        width: int,
        depth: int,
        *,
        arithmetic: Arithmetic = FULL,
        rngs: nnx.Rngs,
    ) -> None:
        degrees = [unit % len(order) for unit in range(width)]
        before = [place - 1 for place in order]
        dot = arithmetic.dot_general
        self.context = nnx.Linear(hidden, width, use_bias=False, dot_general=dot, rngs=rngs)
        masked = functools.partial(_MaskedLinear, dot_general=dot, rngs=rngs)
        sizes = [order] + [degrees] * depth
        self.layers = nnx.List(masked(seen, degrees) for seen in sizes[:-1])
        self.shift = masked(degrees, before, kernel_init=_QUIET)
        is_open = nnx.initializers.constant(_OPEN_GATE)
        self.gate = masked(degrees, before, kernel_init=_QUIET, bias_init=is_open)

    def shift_and_gate(
        self, z: Float[Array, " latent"], context: Float[Array, " context"]
    ) -> tuple[Float[Array, " latent"], Float[Array, " latent"]]:
        """Return the m and s of the step, (latent,) each."""
        first, *others = self.layers
        units = jax.nn.elu(first(z) + self.context(context))
        for layer in others:
            units = jax.nn.elu(layer(units))
        return self.shift(units), self.gate(units)


class PlanarFlow(nnx.Module):
    """Steps z + û tanh(wᵀz + b), with u, w and b affine in the context.

    A step is invertible where wᵀû > -1. So û is u with its component along w divided by
    1 + max(0, -wᵀu), which gives wᵀû = wᵀu where wᵀu is positive, and wᵀu / (1 - wᵀu) elsewhere.
    The softplus of Rezende and Mohamed reaches the same set, but its û has no limit for w → 0.

    Args:
        latent: Dimensions of z.
        hidden: Size of the context.
        num_steps: Number of steps.
        arithmetic: The functions by which layers multiply.
        rngs: Random streams for the initial weights.

    Raises:
        ValueError: If there are no steps; when called, if a shape is not that of one example.

    References:
        Rezende and Mohamed (2015), Variational inference with normalizing flows, equations 10 to 12
        and appendix A.1.
    """

    def __init__(
        self,
        latent: int,
        hidden: int,
        num_steps: int,
        *,
        arithmetic: Arithmetic = FULL,
        rngs: nnx.Rngs,
    ) -> None:
        _require_steps(num_steps)
        affine = functools.partial(
            nnx.Linear, kernel_init=_QUIET, dot_general=arithmetic.dot_general, rngs=rngs
        )
        self.latent, self.context_size, self.num_steps = latent, hidden, num_steps
        # With u small and w of unit size, u has a gradient while the step still changes z little.
        unit = nnx.initializers.normal(latent**-0.5)
        size = num_steps * latent
        self.u = affine(hidden, size)
        self.w = affine(hidden, size, bias_init=unit)
        self.b = affine(hidden, num_steps)

    def __call__(
        self, z: Float[Array, " latent"], context: Float[Array, " context"]
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Return the new z, (latent,), and log|det ∂z_new/∂z|, nats."""
        _require_one_example(self.latent, self.context_size, z, context)
        us, ws = (layer(context).reshape(self.num_steps, -1) for layer in (self.u, self.w))
        log_det = jnp.zeros((), z.dtype)
        for u, w, b in zip(us, ws, self.b(context), strict=True):
            overlap = jnp.sum(w * u)
            excess = jax.nn.relu(-overlap)
            u_hat = u - excess / (1 + excess) * _project(w, u)
            a = jnp.sum(w * z) + b
            z = z + u_hat * jnp.tanh(a)
            # 1 + tanh'(a) wᵀû with 1 = tanh² + tanh', so that nothing cancels where wᵀû is near -1.
            slope = 4 * jax.nn.sigmoid(2 * a) * jax.nn.sigmoid(-2 * a)
            one_plus_overlap = (1 + jax.nn.relu(overlap)) / (1 + excess)
            log_det += jnp.log(jnp.tanh(a) ** 2 + slope * one_plus_overlap)
        return z, log_det


class _MaskedLinear(nnx.Module):
    """An affine layer whose output of degree k depends on the inputs of degree k or less."""

    def __init__(
        self,
        in_degrees: Sequence[int],
        out_degrees: Sequence[int],
        *,
        kernel_init: Callable[..., Array] = _LOUD,
        bias_init: Callable[..., Array] = nnx.initializers.zeros,
        dot_general: Callable[..., Array],
        rngs: nnx.Rngs,
    ) -> None:
        # These are tuples because an array would be a leaf that the optimizer updates.
        self.in_degrees, self.out_degrees = tuple(in_degrees), tuple(out_degrees)
        shape = len(self.in_degrees), len(self.out_degrees)
        self.dot_general = dot_general
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(bias_init(rngs.params(), shape[1:], jnp.float32))

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        mask = np.less_equal.outer(self.in_degrees, self.out_degrees)
        kernel = jnp.where(mask, self.kernel[...], 0.0)
        return self.dot_general(x, kernel, (((0,), (0,)), ((), ()))) + self.bias[...]


def _project(v: Float[Array, " latent"], z: Float[Array, " latent"]) -> Float[Array, " latent"]:
    """The component of z along v; zero, with zero gradients, where v is zero."""
    # Neither value nor gradient depend on the length of v; scaled, its square cannot overflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(v)))
    is_zero = largest == 0
    v = v / jnp.where(is_zero, 1.0, largest)
    return v * (jnp.sum(v * z) / jnp.where(is_zero, 1.0, jnp.sum(v * v)))


def _reflect(
    vectors: Float[Array, "steps latent"], z: Float[Array, " latent"]
) -> Float[Array, " latent"]:
    for v in vectors:
        z = z - 2 * _project(v, z)
    return z


def _require_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")


def _require_one_example(latent: int, context_size: int, z: Array, context: Array) -> None:
    if z.shape != (latent,) or context.shape != (context_size,):
        raise ValueError(
            f"z must have shape {(latent,)} and context {(context_size,)}, got {z.shape} and "
            f"{context.shape}; jax.vmap over the batch."
        )
