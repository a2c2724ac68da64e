"""Published settings by name, and the defaults that other choices depend on."""

import dataclasses
from typing import Any

from vlae_jax.errors import UserError, nearest
from vlae_jax.runs.config import Config
from vlae_jax.runs.methods import find_method

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # The curves in the README of the authors' repository: MNIST, 2000 epochs. Values that equal
    # a default are repeated here, since the curves depend on them.
    "paper-screenshot": {
        "data": {
            "dataset": "mnist",
            "preprocess": "logit",
            "logit_lambda": 1e-6,
            "standardize": True,
        },
        "model": {"latent": 50, "hidden": (500, 500), "activation": "relu", "variance": "shared"},
        "inference": {
            "method": "vlae",
            "steps": 4,
            "damping": "paper",
            "solver": "cholesky",
            "gradient": "unroll",
        },
        "training": {"epochs": 2000, "batch_size": 128, "learning_rate": 5e-4},
        "evaluation": {"importance_samples": 5000, "proposal": "posterior"},
    },
}
"""Published settings, by name; each field is a default that the command line may change."""


def default_config(
    dataset: str | None = None, method: str | None = None, preset: str | None = None
) -> Config:
    """The defaults, given the three choices that others depend on.

    Sizes are the paper's, and smaller for the 8 x 8 digits; linear decoders (ppca, fa) have no
    hidden layers and no epochs.

    Raises:
        UserError: If there is no such preset.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}")
    sections: dict[str, dict[str, Any]] = {
        name: dict(fields) for name, fields in PRESETS.get(preset or "", {}).items()
    }

    def prefer(section: str, **values: Any) -> None:
        sections[section] = {**sections.get(section, {}), **values}

    if dataset is not None:
        prefer("data", dataset=dataset)
    if method is not None:
        prefer("inference", method=method)
    if preset is None and dataset in (None, "digits"):
        prefer("model", latent=16, hidden=(200, 200))
        prefer("training", epochs=120, batch_size=64, learning_rate=1e-3)
    if method is not None and find_method(method).fit is not None:
        prefer("model", hidden=(), variance=find_method(method).variance)
        prefer("training", epochs=0)
    base = Config()
    return Config(
        **{
            name: dataclasses.replace(getattr(base, name), **fields)
            for name, fields in sections.items()
        }
    )
