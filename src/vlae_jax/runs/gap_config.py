"""Settings of the measurement of gaps, which are not part of the configuration of a run."""

import dataclasses
from typing import Literal

from vlae_jax.errors import require, require_counts, require_types


@dataclasses.dataclass(frozen=True)
class GapConfig:
    """Numbers of images, steps and samples in measuring the gaps."""

    images: int = 50
    """Number of test images, from the first on."""
    simulated_images: int = 20
    """Images drawn from the model, for which log p(x) is also bounded from above."""
    temperatures: int = 300
    """Annealed importance sampling: steps from the start to the posterior."""
    chains: int = 8
    """Annealed importance sampling: chains an image."""
    leapfrog: int = 10
    """Leapfrog steps of one HMC transition."""
    start: Literal["laplace", "prior"] = "laplace"
    """Start of the chains: laplace, the Laplace posterior at a converged mode; or prior."""
    family_steps: int = 20
    """Variational Newton steps that search the best Gaussian of the system's family."""
    family_samples: int = 32
    """Samples in each of them, an even number."""
    flow_steps: int = 500
    """For flows: steps of Adam in their place."""
    flow_samples: int = 16
    """For flows: samples in each step of Adam."""
    elbo_samples: int = 2000
    """Samples of each ELBO."""
    search_steps: int = 50
    """Steps after which a mode search counts as converged."""
    batch: int = 10
    """Images measured at once."""

    def __post_init__(self) -> None:
        require_types(self)
        counts = {field.name for field in dataclasses.fields(self)} - {"start"}
        of_two = {"elbo_samples", "temperatures"}
        require_counts(self, *sorted(counts - of_two))
        require_counts(self, *sorted(of_two), least=2)
        require(
            self.family_samples % 2 == 0,
            f"family_samples must be even, as samples come in pairs, got {self.family_samples}",
        )
