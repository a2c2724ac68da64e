"""The inference systems by name: one entry each, with all that the rest of the package needs.

A new system is one function and one entry here. An entry names its functions by their place,
`package.module:function`, so that reports and `--help` can read this table without importing Flax
or JAX. A system of your own may be added to `METHODS` at run time.
"""

from typing import NamedTuple

from vlae_jax.errors import UserError, nearest

_SYSTEMS = "vlae_jax.models.systems"
_LAPLACE = "vlae_jax.models.laplace"


class Method(NamedTuple):
    """One inference system: its names, its functions and its properties."""

    label: str
    """The name in tables and pictures."""
    system: str
    """Place of the function that infers: (observation, key, inference configuration) →
    `vlae_jax.models.systems.Inference`."""
    color: str
    """The color in every picture, of which different T are shades. From the palette of Okabe and
    Ito, whose colors are told apart with every common color vision."""
    has_steps: bool = True
    """Whether the system takes steps T."""
    is_flow: bool = False
    """Whether the posterior's density is known only at its own samples."""
    has_density_in_training: bool = True
    """Whether the samples of training come with their log density, and not its gradient alone."""
    head: str | None = None
    """Place of the function that makes the part of the network that only this system has:
    (configuration, number of the encoder's features, random streams) → module."""
    fit: str | None = None
    """Place of the function that fits a linear decoder to all training images, for a system without
    hidden layers and epochs: (images, latent dimensions) → `vlae_jax.models.linear.LinearModel`."""
    variance: str = "shared"
    """With `fit`: the output variance of its model, shared or per_pixel."""


METHODS: dict[str, Method] = {
    "vae": Method("VAE", f"{_SYSTEMS}:vae", "#000000", has_steps=False),
    "vae_full": Method(
        "VAE+full",
        f"{_SYSTEMS}:full_covariance_vae",
        "#56B4E9",
        has_steps=False,
        head=f"{_SYSTEMS}:full_covariance_head",
    ),
    "vae_hf": Method(
        "VAE+HF",
        f"{_SYSTEMS}:flow_vae",
        "#009E73",
        is_flow=True,
        head=f"{_SYSTEMS}:householder_head",
    ),
    "vae_iaf": Method(
        "VAE+IAF",
        f"{_SYSTEMS}:flow_vae",
        "#CC79A7",
        is_flow=True,
        head=f"{_SYSTEMS}:inverse_autoregressive_head",
    ),
    "vae_planar": Method(
        "VAE+planar",
        f"{_SYSTEMS}:flow_vae",
        "#D55E00",
        is_flow=True,
        head=f"{_SYSTEMS}:planar_head",
    ),
    "vae_fif": Method(
        "VAE+FIF",
        "vlae_jax.models.free_form:free_form_vae",
        "#882255",
        has_steps=False,
        has_density_in_training=False,
    ),
    "sa_vae": Method("SA-VAE", f"{_SYSTEMS}:semi_amortized_vae", "#E69F00"),
    "vae_iter": Method(
        "VAE+iter",
        "vlae_jax.models.iterative:iterative_vae",
        "#B59F00",
        head="vlae_jax.models.iterative:iterative_head",
    ),
    "vlae": Method("VLAE", f"{_LAPLACE}:vlae", "#0072B2"),
    "ppca": Method(
        "pPCA",
        f"{_LAPLACE}:linear_gaussian",
        "#999999",
        has_steps=False,
        fit="vlae_jax.models.linear:fit_ppca",
    ),
    "fa": Method(
        "FA",
        f"{_LAPLACE}:linear_gaussian",
        "#666666",
        has_steps=False,
        fit="vlae_jax.models.linear:fit_factor_analysis",
        variance="per_pixel",
    ),
}


def find_method(name: str) -> Method:
    """The entry of that name.

    Raises:
        UserError: If there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}")
    return METHODS[name]
