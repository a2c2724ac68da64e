"""What the report draws, against plain numpy on a linear model."""

import numpy as np
import pytest
from problems import assert_close

from vlae_jax.config import Config, DataConfig, InferenceConfig, ModelConfig
from vlae_jax.diagnostics import take_snapshots
from vlae_jax.experiment import build_experiment

pytestmark = pytest.mark.usefixtures("quick_compile")


def linear_experiment(method):
    """Without hidden layers the decoder is affine: probabilistic PCA on real images."""
    return build_experiment(
        Config(
            data=DataConfig(preprocess="raw"),
            model=ModelConfig(latent=3, hidden=()),
            inference=InferenceConfig(method=method, steps=1),
        )
    )


class Linear:
    """The model of a `linear_experiment` and its posteriors, in float64 numpy."""

    def __init__(self, experiment):
        model = experiment.merge(experiment.initial_params)
        self.kernel, self.bias = (
            np.asarray(part[...], np.float64) for part in (model.head.kernel, model.head.bias)
        )
        self.encoder = [
            np.asarray(part[...], np.float64) for part in (model.mean.kernel, model.mean.bias)
        ]
        self.variance = float(np.exp(np.float64(model.log_var)))
        self.precision = np.eye(3) + self.kernel @ self.kernel.T / self.variance
        self.mean = np.asarray(experiment.preprocessor.mean, np.float64)
        pixels = experiment.dataset.test / (experiment.dataset.levels - 1)
        self.xs = pixels.reshape(len(pixels), -1) - self.mean
        self.guesses = self.xs @ self.encoder[0] + self.encoder[1]
        pulls = (self.xs - self.bias) @ self.kernel.T / self.variance
        self.modes = np.linalg.solve(self.precision, pulls.T).T

    def decode(self, zs):
        return zs @ self.kernel + self.bias

    def pictures(self, zs):
        return np.clip(self.decode(zs) + self.mean, 0, 1).reshape(*zs.shape[:-1], 8, 8, 1)


@pytest.fixture(scope="module")
def searched(quick_compile):
    experiment = linear_experiment("vlae")
    return Linear(experiment), take_snapshots(experiment, experiment.initial_params)


def test_snapshots_show_the_data_and_every_step(searched):
    """One full step of a linear model lands on the mode, whatever the encoder said."""
    linear, snapshots = searched
    assert {name: array.shape for name, array in snapshots.items()} == {
        "data": (10, 8, 8, 1),
        "reconstructions": (10, 2, 8, 8, 1),
        "covariances": (10, 3, 3),
        "step_log_joint": (250, 2),
        "step_error": (250, 2),
        "prior_samples": (64, 8, 8, 1),
        "interpolations": (6, 9, 8, 8, 1),
    }
    assert_close(snapshots["data"][..., 0], (linear.xs + linear.mean)[:10].reshape(10, 8, 8))
    assert (np.diff(snapshots["step_log_joint"]) > 0).all()
    shown = np.stack([linear.guesses[:10], linear.modes[:10]], axis=1)
    assert_close(snapshots["reconstructions"], linear.pictures(shown))
    for covariance in snapshots["covariances"]:
        assert_close(covariance, np.linalg.inv(linear.precision))


def test_step_error_is_the_root_mean_squared_error_of_the_reconstruction(searched):
    linear, snapshots = searched
    for step, zs in enumerate((linear.guesses, linear.modes)):
        error = np.sqrt(np.mean((linear.decode(zs) - linear.xs) ** 2, axis=1))
        assert_close(snapshots["step_error"][:, step], error[:250])


def test_interpolations_lead_from_one_posterior_mean_to_another(searched):
    """Evenly on the line between them; six pairs of twelve images."""
    linear, snapshots = searched
    first, last = linear.modes[:6], linear.modes[6:12]
    assert_close(snapshots["interpolations"][:, 0], linear.pictures(first))
    assert_close(snapshots["interpolations"][:, -1], linear.pictures(last))
    assert_close(snapshots["interpolations"][:, 2], linear.pictures(0.75 * first + 0.25 * last))


def test_snapshots_of_a_flow_have_its_sampled_moments():
    """One iterate instead of several; the covariance is positive definite."""
    experiment = linear_experiment("vae_iaf")
    snapshots = take_snapshots(experiment, experiment.initial_params)
    assert snapshots["reconstructions"].shape == (10, 1, 8, 8, 1)
    assert snapshots["step_error"].shape == (250, 1)
    assert snapshots["covariances"].shape == (10, 3, 3)
    assert (np.linalg.eigvalsh(snapshots["covariances"]) > 0).all()
