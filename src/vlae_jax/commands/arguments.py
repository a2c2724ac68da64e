"""Types of arguments that several commands take."""

import dataclasses
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vlae_jax.runs.config import InferenceConfig
from vlae_jax.runs.storage import as_folder

if TYPE_CHECKING:
    from vlae_jax.models.trained import Trained

Folder = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: as_folder(words[0]),
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""The name of a folder or file, local or in a bucket."""


@dataclasses.dataclass(frozen=True)
class InferenceChoice:
    """How a trained model infers, where that is to differ from its training."""

    method: str | None = None
    """Infer by another method than the run's: vlae, the Laplace posterior at a searched mode, takes
    any run."""
    steps: int | None = None
    """T of that method; by default the run's."""
    refine: Literal["none", "variational"] | None = None
    """variational: move the posterior on, towards the full-covariance Gaussian of largest ELBO; by
    default as in the run."""
    refine_steps: int | None = None
    """With --refine: variational Newton steps; by default the run's."""
    refine_samples: int | None = None
    """With --refine: samples of each step, an even number; by default the run's."""

    def __post_init__(self) -> None:
        InferenceConfig(**self.changes)

    @property
    def changes(self) -> dict[str, Any]:
        """The choices made."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def of(self, trained: "Trained") -> "Trained":
        """The model with this way to infer.

        Raises:
            UserError: If the model cannot infer so.
        """
        return trained.with_inference(**self.changes) if self.changes else trained

    @property
    def name(self) -> str:
        """The choices as part of a file's name: ``vlae-steps20-variational``."""
        words = [
            str(value) if isinstance(value, str) else f"{name.replace('_', '-')}{value}"
            for name, value in self.changes.items()
        ]
        return "-".join(words)


Inference = Annotated[InferenceChoice, tyro.conf.OmitArgPrefixes]
"""The choice as options without a prefix."""
