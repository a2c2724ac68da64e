"""The arrays for the report's pictures, against plain numpy on a linear model."""

import jax
import numpy as np
import pytest
from builders import Linear, digits, linear_config, untrained
from problems import assert_close

from vlae_jax.analysis.snapshots import take_snapshots
from vlae_jax.data.preprocessing import fixed_keys

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def searched(quick_compile):
    trained = untrained(linear_config("vlae"))
    return Linear(trained, digits().test), take_snapshots(trained, digits().test)


def test_snapshots_show_the_data_and_every_step(searched):
    """One full step of a linear model ends at the mode, from any guess of the encoder."""
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


def test_prior_samples_are_decoded_from_standard_normal_codes(searched):
    """Read off the pixels that are not clipped: 64 codes in three dimensions."""
    linear, snapshots = searched
    pictures = snapshots["prior_samples"].reshape(64, -1).astype(np.float64)
    inside = ((pictures > 0) & (pictures < 1)).all(axis=0)
    assert inside.sum() > 10
    decoded = (pictures - linear.mean - linear.bias)[:, inside]
    codes = np.linalg.lstsq(linear.kernel[:, inside].T, decoded.T)[0].T
    assert_close(codes @ linear.kernel[:, inside], decoded, rtol=1e-3)
    assert_close(codes.mean(axis=0), np.zeros(3), standard_error=1 / 64**0.5)
    assert_close(codes.var(axis=0), np.ones(3), standard_error=(2 / 64) ** 0.5)


def test_snapshots_of_a_flow_have_its_sampled_moments():
    """A Householder flow has known moments; its snapshots have one point instead of a path."""
    trained, images = untrained(linear_config("vae_hf")), digits().test[:12]
    snapshots = take_snapshots(trained, images)

    @jax.jit
    @jax.vmap
    def reflect(key, pixels):
        posterior = trained.infer(key, pixels).posterior
        move = lambda z: posterior.flow(z, posterior.context)[0]  # noqa: E731
        center = posterior.base.mean
        return move(center), jax.jacfwd(move)(center), posterior.base.log_std

    means, turns, log_stds = (np.float64(part) for part in reflect(fixed_keys(12), images))
    linear = Linear(trained, images)
    assert_close(log_stds, linear.log_stds, rtol=1e-4)
    assert_close(
        turns @ np.swapaxes(turns, 1, 2), np.broadcast_to(np.eye(3), (12, 3, 3)), rtol=1e-5
    )
    assert np.abs(turns - np.eye(3)).max() > 0.1
    truth = np.einsum("nij,nj,nkj->nik", turns, np.exp(2 * log_stds), turns)[:10]
    variances = np.diagonal(truth, axis1=1, axis2=2)
    # Of a covariance from n Gaussian samples: (Σᵢᵢ Σⱼⱼ + Σᵢⱼ²) / n.
    error = np.sqrt((variances[:, :, None] * variances[:, None, :] + truth**2) / 2000)
    assert_close(snapshots["covariances"], truth, standard_error=error)
    assert_close(snapshots["reconstructions"], linear.pictures(means[:10, None]), rtol=1e-4)
    error = np.sqrt(np.mean((linear.decode(means) - linear.xs) ** 2, axis=1))
    assert_close(snapshots["step_error"], error[:, None], rtol=1e-4)
