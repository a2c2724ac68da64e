"""Metrics: the measured quantities by name, with label, unit and threshold.

Results files, tables, reports and studies take these from `QUANTITIES` alone.
"""

from typing import NamedTuple

import numpy as np


class Unit(NamedTuple):
    """How values of a unit are written."""

    decimals: int
    factor: float = 1.0
    suffix: str = ""


UNITS = {
    "nats": Unit(2),
    "bits/dim": Unit(4),
    "share": Unit(2, 100.0, " %"),
    "samples": Unit(1),
    "number": Unit(2),
}
"""Nats are those of an image, shares those of all images."""


class Quantity(NamedTuple):
    """Label, unit and meaning of one measured quantity."""

    label: str
    """The name in tables and pictures."""
    unit: str = "nats"
    """A key of `UNITS`."""
    outlying: int = 0
    """For scores of images: 1 where high values are outlying, -1 where low ones are."""
    threshold: float | None = None
    """Values above it are a warning; None where there is no such limit."""
    undefined: str = "not finite"
    """Stands in tables where there is no finite value."""


FINITE_VARIANCE_K = 0.5
"""Pareto k̂ below which importance weights have a finite variance."""
UNRELIABLE_K = 0.7
"""Pareto k̂ above which an importance-weighted estimate is not to be relied on (Vehtari et al.,
2024)."""

QUANTITIES: dict[str, Quantity] = {
    "log_prob": Quantity("log p(x)", outlying=-1),
    "elbo": Quantity("ELBO", outlying=-1),
    "inference_gap": Quantity("gap"),
    "kl": Quantity("KL"),
    "reconstruction": Quantity("reconstruction"),
    "bits_per_dim": Quantity("bits/dim", "bits/dim", outlying=1),
    "ess": Quantity("effective samples", "samples"),
    "log_prob_sampling_error": Quantity("sampling error of log p(x)"),
    "pareto_k": Quantity("Pareto k", "number", outlying=1, threshold=UNRELIABLE_K),
    "unreliable": Quantity(f"k̂ > {UNRELIABLE_K}", "share", undefined="too few samples"),
    "annealed": Quantity("annealed", "share"),
    "own_log_prob": Quantity("log p(x), own proposal", outlying=-1),
    "own_ess": Quantity("effective samples, own proposal", "samples"),
    "own_log_prob_sampling_error": Quantity("sampling error of log p(x), own proposal"),
    "own_pareto_k": Quantity("Pareto k, own proposal", "number", threshold=UNRELIABLE_K),
    "own_unreliable": Quantity(
        f"k̂ > {UNRELIABLE_K}, own proposal", "share", undefined="too few samples"
    ),
    "not_finite": Quantity("not finite", "share"),
    "unconverged": Quantity("unconverged", "share"),
    "not_positive_definite": Quantity("not PD", "share"),
    "newton_decrement": Quantity("Newton decrement", outlying=1),
    "objective": Quantity("objective"),
    "amortization_loss": Quantity("amortization loss"),
    "log_prob_ais": Quantity("log p(x), AIS"),
    "best_in_family_elbo": Quantity("best ELBO of the family"),
    "converged_elbo": Quantity("ELBO at the converged mode"),
    "amortized_elbo": Quantity("ELBO"),
    "approximation_gap": Quantity("approximation gap"),
    "amortization_gap": Quantity("amortization gap"),
    "non_convergence_gap": Quantity("of it non-convergence"),
    "ais_sampling_error": Quantity("sampling error of AIS"),
    "ais_acceptance": Quantity("acceptance of AIS", "share"),
    "bdmc_lower": Quantity("AIS lower bound, simulated"),
    "bdmc_upper": Quantity("AIS upper bound, simulated"),
    "bdmc_gap": Quantity("AIS sandwich, simulated"),
}


def titled(name: str) -> str:
    """The label of a quantity with its unit, for a table of several units: ``ELBO, nats``."""
    quantity = QUANTITIES[name]
    has_unit = quantity.unit in ("nats", "samples")
    return f"{quantity.label}, {quantity.unit}" if has_unit else quantity.label


class Metric(NamedTuple):
    """One number of a results file."""

    name: str
    """A key of `QUANTITIES`."""
    value: float
    standard_error: float | None
    """Over images."""
    unit: str
    images: int
    """Number of images in the mean; those without a finite value are left out."""
    samples: int | None = None
    """Posterior samples for each image; None where the number has no influence."""
    split: str = "test"


def mean_metric(
    name: str, values: np.ndarray, samples: int | None = None, *, split: str = "test"
) -> Metric:
    """The mean over the images whose value is finite, with its standard error.

    Args:
        name: A key of `QUANTITIES`.
        values: One number for each image, (n,).
        samples: Posterior samples for each image, where their number has an influence.
        split: The name of the set of images.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None
    value = float(np.mean(values)) if n else float("nan")
    return Metric(name, value, error, QUANTITIES[name].unit, n, samples, split)
