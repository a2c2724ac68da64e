"""The shipped model's output: a density for each group of columns, learned parameters, draws.

A decoder gives each entry of x one number or several (`Group.outputs`). Those of a group lie in the
decoder's output as a matrix (outputs, columns) in row-major order, one group after the other.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vlae_jax.counts import (
    negative_binomial,
    poisson,
    zero_inflated_negative_binomial,
    zero_inflated_negative_binomial_fisher,
    zero_inflated_poisson,
    zero_inflated_poisson_fisher,
)
from vlae_jax.densities import (
    bernoulli,
    categorical,
    discretized_logistic,
    gaussian,
    gaussian_heteroscedastic,
    gaussian_heteroscedastic_fisher,
    student_t,
    student_t_fisher,
)

Parameter = Any
"""A learned parameter of a group: a scalar, one for each column, or None for no parameter."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Columns that share a density. Hashable, and static under `jax.jit`."""

    kind: str
    """A name of `runs.likelihoods.LIKELIHOODS`, or gaussian_heteroscedastic."""
    columns: tuple[int, ...] = ()
    """Their indices; none for all columns in order."""
    classes: int = 0
    """Classes of a categorical column, or levels of a discretized one."""
    df: float = 0.0
    """Degrees of freedom of a Student-t."""
    min_std: float = 0.0
    """Floor of the standard deviation that the decoder gives a gaussian_heteroscedastic column."""

    @property
    def outputs(self) -> int:
        """How many numbers the decoder gives each entry."""
        return self.classes if self.kind == "categorical" else _KINDS[self.kind].outputs

    @property
    def parameter(self) -> str | None:
        """Name of the learned parameter: log_var, log_scale, log_dispersion, or None."""
        return _KINDS[self.kind].parameter

    @property
    def is_log_concave(self) -> bool:
        """Whether the density is log-concave in the decoder's output."""
        return _KINDS[self.kind].fisher is None

    def log_prob(self, x: Array, eta: Array, parameter: Parameter) -> Array:
        """Log density of the entries x (n,) given eta (outputs * n,), nats, summed."""
        return _KINDS[self.kind].log_prob(self, x, eta, parameter)

    def each(self, x: Array, eta: Array, parameter: Parameter) -> Array:
        """Log density of each entry, (n,), nats."""
        return jax.vmap(self._entry)(x, *self._by_entry(x.size, eta, parameter))

    def information(self, x: Array, eta: Array, parameter: Parameter) -> Float[Array, "k k n"]:
        """Curvature of each entry in the decoder's output, positive semidefinite blocks.

        Minus the Hessian of the log density where that is concave, else the Fisher information.
        """
        fisher = _KINDS[self.kind].fisher
        if fisher is None:
            hessian = jax.vmap(jax.hessian(self._entry, argnums=1))
            return -jnp.moveaxis(hessian(x, *self._by_entry(x.size, eta, parameter)), 0, -1)
        found = fisher(self, eta, parameter)
        if found.ndim == 3:
            return found
        outputs = self.outputs  # a diagonal
        return jnp.eye(outputs, dtype=eta.dtype)[..., None] * found.reshape(outputs, 1, -1)

    def _entry(self, x: Array, eta: Array, parameter: Parameter) -> Array:
        return self.log_prob(x[None], eta, parameter)

    def _by_entry(self, n: int, eta: Array, parameter: Parameter) -> tuple[Array, Parameter]:
        own = None if parameter is None else jnp.broadcast_to(parameter, (n,))
        return eta.reshape(self.outputs, n).T, own

    def expected(self, eta: Array, parameter: Parameter) -> Array:
        """Expected x, (n,); the most probable class of categorical columns."""
        return _KINDS[self.kind].expected(self, eta.reshape(self.outputs, -1), parameter)

    def draw(self, key: PRNGKeyArray, eta: Array, parameter: Parameter) -> Array:
        """A sample of x, (n,)."""
        return _KINDS[self.kind].draw(self, key, eta.reshape(self.outputs, -1), parameter)

    def see(self, x: Array) -> Float[Array, "n *classes"]:
        """The entries x (n,) as the encoder sees them, (n,) or one-hot (n, classes)."""
        if self.kind == "categorical":
            return jax.nn.one_hot(x.astype(jnp.int32), self.classes, dtype=x.dtype)
        if self.kind == "discretized_logistic":
            return 2 * x / (self.classes - 1) - 1
        return jnp.log1p(x) if self.kind in _COUNTS else x

    def start(self, average: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where training starts, by mean and variance of the columns in model space.

        Returns:
            The decoder's output, (outputs, n), and the learned parameter, (n,).
        """
        eta = np.zeros((self.outputs, len(average)))
        spread = np.zeros(len(average))
        if self.kind in _COUNTS:
            mean = np.maximum(average, 1e-2)
            eta[0] = np.log(mean)
            eta[1:] = -2.0  # few additional zeros
            spread = np.log(np.clip((variance - mean) / mean**2, 0.05, 20.0))
        elif self.kind == "discretized_logistic":
            eta[0] = average / (self.classes - 1)
            std = np.sqrt(variance) / (self.classes - 1)
            spread = np.log(np.maximum(std, 0.5 / self.classes) * math.sqrt(3) / math.pi)
        elif self.kind == "student_t":
            eta[0] = average
            share = (self.df - 2) / self.df if self.df > 2.5 else 0.2
            spread = 0.5 * np.log(variance * share)
        elif self.kind in ("gaussian", "gaussian_heteroscedastic"):
            eta[0] = average
            spread = np.log(variance)
            eta[1:] = spread
        return eta, spread

    def floor(self, min_std: float) -> float:
        """The lowest value of the learned parameter, by the least standard deviation."""
        lowest = {"log_var": 2.0 * float(np.log(min_std)), "log_dispersion": math.log(1e-4)}
        return lowest.get(self.parameter or "", float(np.log(min_std)))


class _Kind(NamedTuple):
    log_prob: Callable[[Group, Array, Array, Parameter], Array]
    """Of entries (n,), given eta (outputs * n,)."""
    expected: Callable[[Group, Array, Parameter], Array]
    """Given eta (outputs, n)."""
    draw: Callable[[Group, PRNGKeyArray, Array, Parameter], Array]
    parameter: str | None = None
    outputs: int = 1
    fisher: Callable[[Group, Array, Parameter], Array] | None = None
    """The Fisher information of a density that is not log-concave: diagonal or blocks."""


def _draw_gaussian(g: Group, key: PRNGKeyArray, eta: Array, log_var: Parameter) -> Array:
    return eta[0] + jnp.exp(0.5 * log_var) * jax.random.normal(key, eta[0].shape, eta.dtype)


def _floored(g: Group, eta: Array, part: int | None = None) -> Array:
    """Means and log variances (2 n,), the latter not below the floor; or one of both, (n,)."""
    mean, log_var = jnp.split(eta, 2)
    if g.min_std:
        log_var = jnp.maximum(log_var, 2.0 * math.log(g.min_std))
    return jnp.concatenate([mean, log_var]) if part is None else (mean, log_var)[part]


def _fisher_of_heteroscedastic(g: Group, eta: Array, _: Parameter) -> Array:
    floored = _floored(g, eta)
    # Below its floor a log variance has no effect, and no information.
    return jnp.where(floored == eta, gaussian_heteroscedastic_fisher(floored), 0.0)


def _draw_poisson(key: PRNGKeyArray, rate: Array) -> Array:
    # Beyond this a 32-bit count overflows, and one draw more or less is not seen.
    return jax.random.poisson(key, jnp.minimum(rate, 1e9)).astype(rate.dtype)


def _draw_negative_binomial(
    g: Group, key: PRNGKeyArray, eta: Array, log_dispersion: Parameter
) -> Array:
    gamma_key, poisson_key = jax.random.split(key)
    shape = jnp.broadcast_to(jnp.exp(-log_dispersion), eta[0].shape)
    return _draw_poisson(poisson_key, jnp.exp(eta[0]) * jax.random.gamma(gamma_key, shape) / shape)


def _with_zeros(draw: Callable[[Group, PRNGKeyArray, Array, Parameter], Array]) -> Any:
    def inflated(g: Group, key: PRNGKeyArray, eta: Array, parameter: Parameter) -> Array:
        zero_key, count_key = jax.random.split(key)
        is_zero = jax.random.bernoulli(zero_key, jax.nn.sigmoid(eta[1]))
        return jnp.where(is_zero, 0.0, draw(g, count_key, eta, parameter))

    return inflated


def _draw_levels(g: Group, key: PRNGKeyArray, eta: Array, log_scale: Parameter) -> Array:
    noise = jax.random.logistic(key, eta[0].shape, eta.dtype)
    levels = (eta[0] + jnp.exp(log_scale) * noise) * (g.classes - 1)
    return jnp.clip(jnp.round(levels), 0, g.classes - 1)


def _log_prob_of_classes(g: Group, x: Array, eta: Array, _: Parameter) -> Array:
    return categorical(x.astype(jnp.int32), eta.reshape(g.classes, -1).T)


def _first(g: Group, eta: Array, _: Parameter) -> Array:
    return eta[0]


def _inflated_mean(g: Group, eta: Array, _: Parameter) -> Array:
    return jax.nn.sigmoid(-eta[1]) * jnp.exp(eta[0])


def _draw_poissons(g: Group, key: PRNGKeyArray, eta: Array, _: Parameter) -> Array:
    return _draw_poisson(key, jnp.exp(eta[0]))


_KINDS: dict[str, _Kind] = {
    "gaussian": _Kind(
        lambda g, x, eta, p: gaussian(x, eta, p), _first, _draw_gaussian, parameter="log_var"
    ),
    "gaussian_heteroscedastic": _Kind(
        lambda g, x, eta, p: gaussian_heteroscedastic(x, _floored(g, eta)),
        _first,
        lambda g, key, eta, p: _draw_gaussian(g, key, eta, _floored(g, eta.reshape(-1), 1)),
        outputs=2,
        fisher=_fisher_of_heteroscedastic,
    ),
    "student_t": _Kind(
        lambda g, x, eta, p: student_t(x, eta, p, g.df),
        _first,
        lambda g, key, eta, p: (
            eta[0] + jnp.exp(p) * jax.random.t(key, g.df, eta[0].shape, eta.dtype)
        ),
        parameter="log_scale",
        fisher=lambda g, eta, p: student_t_fisher(eta, p, g.df),
    ),
    "bernoulli": _Kind(
        lambda g, x, eta, p: bernoulli(x, eta),
        lambda g, eta, p: jax.nn.sigmoid(eta[0]),
        lambda g, key, eta, p: jax.random.bernoulli(key, jax.nn.sigmoid(eta[0])).astype(eta.dtype),
    ),
    "categorical": _Kind(
        _log_prob_of_classes,
        lambda g, eta, p: jnp.argmax(eta, axis=0).astype(eta.dtype),
        lambda g, key, eta, p: jax.random.categorical(key, eta, axis=0).astype(eta.dtype),
    ),
    "poisson": _Kind(
        lambda g, x, eta, p: poisson(x, eta), lambda g, eta, p: jnp.exp(eta[0]), _draw_poissons
    ),
    "negative_binomial": _Kind(
        lambda g, x, eta, p: negative_binomial(x, eta, p),
        lambda g, eta, p: jnp.exp(eta[0]),
        _draw_negative_binomial,
        parameter="log_dispersion",
    ),
    "zero_inflated_poisson": _Kind(
        lambda g, x, eta, p: zero_inflated_poisson(x, eta),
        _inflated_mean,
        _with_zeros(_draw_poissons),
        outputs=2,
        fisher=lambda g, eta, p: zero_inflated_poisson_fisher(eta),
    ),
    "zero_inflated_negative_binomial": _Kind(
        lambda g, x, eta, p: zero_inflated_negative_binomial(x, eta, p),
        _inflated_mean,
        _with_zeros(_draw_negative_binomial),
        parameter="log_dispersion",
        outputs=2,
        fisher=lambda g, eta, p: zero_inflated_negative_binomial_fisher(eta, p),
    ),
    "discretized_logistic": _Kind(
        lambda g, x, eta, p: discretized_logistic(x / (g.classes - 1), eta, p, levels=g.classes),
        lambda g, eta, p: jnp.clip(eta[0], 0, 1) * (g.classes - 1),
        _draw_levels,
        parameter="log_scale",
    ),
}
_COUNTS = frozenset(name for name in _KINDS if name.endswith(("poisson", "binomial")))


@dataclasses.dataclass(frozen=True)
class Output:
    """The densities of all columns: their groups, in the order of the decoder's output. Static."""

    groups: tuple[Group, ...]
    dim: int

    @property
    def name(self) -> str:
        """The density of all columns, or mixed where they differ."""
        return self.groups[0].kind if len(self.groups) == 1 else "mixed"

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers of the decoder's output belong to each group."""
        return tuple(group.outputs * self._count(group) for group in self.groups)

    @property
    def seen_size(self) -> int:
        """How many numbers the encoder sees."""
        return sum(
            self._count(g) * (g.outputs if g.kind == "categorical" else 1) for g in self.groups
        )

    @property
    def is_log_concave(self) -> bool:
        """Whether the log density is concave in the decoder's output."""
        return all(group.is_log_concave for group in self.groups)

    def log_prob(
        self,
        x: Float[Array, " dim"],
        eta: Float[Array, " out"],
        parameters: Sequence[Parameter],
        observed: Bool[Array, " dim"] | None = None,
    ) -> Float[Array, ""]:
        """Log density of the observed entries of x given the decoder's output, nats."""
        first, *others = (
            group.log_prob(x_g, eta_g, parameter)
            if seen is None
            else jnp.sum(group.each(jnp.where(seen, x_g, 0.0), eta_g, parameter), where=seen)
            for group, x_g, eta_g, parameter, seen in self._parts(x, eta, parameters, observed)
        )
        return sum(others, first)

    def information(
        self,
        x: Float[Array, " dim"],
        eta: Float[Array, " out"],
        parameters: Sequence[Parameter],
        observed: Bool[Array, " dim"] | None = None,
    ) -> tuple[Float[Array, "k k n"], ...]:
        """Curvature in the decoder's output, blocks of each group; see `Group.information`."""
        found = []
        for group, x_g, eta_g, parameter, seen in self._parts(x, eta, parameters, observed):
            x_g = x_g if seen is None else jnp.where(seen, x_g, 0.0)
            blocks = group.information(x_g, eta_g, parameter)
            found.append(blocks if seen is None else jnp.where(seen, blocks, 0.0))
        return tuple(found)

    def _parts(
        self, x: Array, eta: Array, parameters: Sequence[Parameter], observed: Array | None
    ) -> list[tuple[Group, Array, Array, Parameter, Array | None]]:
        etas = self._split(eta)
        given = zip(self.groups, etas, parameters, strict=True)
        return [
            (g, self._take(g, x), e, p, None if observed is None else self._take(g, observed))
            for g, e, p in given
        ]

    def expected(self, eta: Float[Array, " out"], parameters: Sequence[Parameter]) -> Array:
        """Expected x given the decoder's output, (dim,)."""
        given = zip(self.groups, self._split(eta), parameters, strict=True)
        return self._join([group.expected(part, parameter) for group, part, parameter in given])

    def draw(
        self, key: PRNGKeyArray, eta: Float[Array, " out"], parameters: Sequence[Parameter]
    ) -> Float[Array, " dim"]:
        """A sample of x given the decoder's output, (dim,)."""
        keys = [key] if len(self.groups) == 1 else jax.random.split(key, len(self.groups))
        given = zip(self.groups, keys, self._split(eta), parameters, strict=True)
        return self._join([group.draw(key, part, p) for group, key, part, p in given])

    def see(
        self, x: Float[Array, " dim"], observed: Bool[Array, " dim"] | None = None
    ) -> Float[Array, " seen"]:
        """The entries as the encoder sees them; a missing class has no one among its zeros."""
        parts = []
        for group in self.groups:
            seen = group.see(self._take(group, x))
            if group.kind == "categorical" and observed is not None:
                seen = seen * self._take(group, observed)[:, None]
            parts.append(seen.reshape(-1))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def parts(self, *values: np.ndarray) -> Iterator[tuple[Any, ...]]:
        """Each group with its columns' part of the values, (dim,) each."""
        for group in self.groups:
            yield (group, *(self._take(group, value) for value in values))

    def _count(self, group: Group) -> int:
        return len(group.columns) or self.dim

    def _take(self, group: Group, values: Any) -> Any:
        return values[np.array(group.columns)] if group.columns else values

    def _split(self, eta: Array) -> list[Array]:
        return list(jnp.split(eta, np.cumsum(self.sizes)[:-1]))

    def _join(self, parts: Sequence[Array]) -> Array:
        if len(parts) == 1 and not self.groups[0].columns:
            return parts[0]
        order = np.argsort(np.concatenate([np.array(group.columns) for group in self.groups]))
        return jnp.concatenate(parts)[order]
