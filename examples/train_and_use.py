"""The shipped model from start to end: fit, save, load elsewhere, encode, sample.

A small VLAE learns the 8 x 8 digits of scikit-learn. Its folder is all that is needed to use it.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import vlae_jax
from vlae_jax.analysis.uses import encode, reconstruct, sample


def settings(epochs=5):
    """The defaults for digits with a smaller network and fewer epochs."""
    config = vlae_jax.default_config("digits", "vlae")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, latent=8, hidden=(64,)),
        training=dataclasses.replace(config.training, epochs=epochs, batch_size=64),
    )


def main():
    """Train on nine tenths of the digits and use the model on the others."""
    images = load_digits().images.astype(np.uint8)
    train, test = images[:1600], images[1600:, :, :, None]
    trained = vlae_jax.fit(settings(), {"x_train": train, "levels": 17})

    with tempfile.TemporaryDirectory() as folder:
        vlae_jax.save(trained, Path(folder) / "digits")
        model = vlae_jax.load(Path(folder) / "digits")

    codes = encode(model, test)
    std = np.sqrt(np.diagonal(codes["covariance"], axis1=1, axis2=2))
    print(f"codes {codes['mean'].shape}, standard deviations {std.min():.2f} to {std.max():.2f}")

    error = np.mean(reconstruct(model, test)["squared_error"])
    spread = np.mean((test / 16 - train.mean(axis=0)[..., None] / 16) ** 2)
    print(f"squared error of reconstructions {error:.3f}, of the mean image {spread:.3f}")

    pictures = sample(model, 16, seed=0)["expected"]
    print(f"samples {pictures.shape}, from {pictures.min():.2f} to {pictures.max():.2f}")
    return {"codes": codes, "std": std, "error": error, "spread": spread, "pictures": pictures}


if __name__ == "__main__":
    main()
