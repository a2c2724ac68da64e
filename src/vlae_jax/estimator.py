"""The model in the form of scikit-learn: `VLAE`, a transformer and a density of tables.

It composes `fit` and the uses of `analysis`, and adds nothing to them: whatever they can do beyond
this form is done with `VLAE(...).trained_`.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import FLOAT_DTYPES, check_array, check_is_fitted, validate_data

from vlae_jax.analysis import uses
from vlae_jax.analysis.imputation import impute
from vlae_jax.data.sets import ARRAYS, dataset_from_arrays
from vlae_jax.errors import RunFailure, UserError
from vlae_jax.models.initial import initialize
from vlae_jax.models.trained import Trained
from vlae_jax.progress import silenced
from vlae_jax.runs.config import Config
from vlae_jax.runs.methods import find_method
from vlae_jax.training.loop import fit

_VARIANCES = {"shared": "shared", "per_column": "per_pixel", "heteroscedastic": "heteroscedastic"}


class VLAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    """Deep latent-variable model of a table, with Laplace or other approximate posteriors.

    Rows are examples, columns are features; NaN marks a missing entry. Densities are in nats and in
    the data's own units.

    Parameters:
        n_components: Dimensions of the latent space.
        hidden_layer_sizes: Widths of the encoder's hidden layers; the decoder takes them reversed.
            Without any, `()`, the model is linear: factor analysis, or probabilistic PCA with
            variance "shared", fitted in closed form where the output is Gaussian and no entry is
            missing.
        activation: relu, leaky_relu, softplus, tanh, elu or gelu.
        method: The inference system: vlae, vae or another name of `vlae_jax train --method`. auto
            is vlae, and the closed form where there is one.
        n_steps: T, the steps of the search, or of another method that takes steps.
        likelihood: Density of the outputs, by name; or one for each group of columns, as pairs
            (("poisson", 3), ("gaussian", 5)) or by the names of a data frame's columns. auto is
            Gaussian.
        variance: Of a Gaussian output: per_column, shared or heteroscedastic.
        preprocess: standardize (each column by its mean and standard deviation) or none; auto is
            standardize for numbers and none for counts, classes and binary columns.
        max_iter: Largest number of epochs.
        n_iter_no_change: Stop after so many epochs without a better bound on the validation rows;
            None trains for all of them. The best epoch's parameters are kept.
        batch_size: Rows of a step, fewer if there are not as many.
        learning_rate_init: Adam's step size.
        validation_fraction: Share of the rows that is set aside, except in closed form.
        n_importance_samples: Samples in the estimate of log p(x) of each row.
        image_shape: (height, width, channel) if each row is an image, for a convolutional network.
        config: A whole `Config` for all that has no parameter here; those of this class replace its
            fields of the same meaning.
        random_state: Seed of initial weights, order and samples: an int, a RandomState, or None.
        verbose: Whether to show progress on stderr.

    Attributes:
        trained_: The `Trained`, for all that `vlae_jax` can do with a model.
        n_features_in_: Number of columns.
        feature_names_in_: Names of a data frame's columns, where they are texts.
        n_iter_: Epochs that led to the parameters, at least 1.

    Raises:
        ValueError: By every method, with one line, for data or parameters that do not fit.

    References:
        Park, Kim and Kim (2019), Variational Laplace autoencoders.
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        hidden_layer_sizes: Sequence[int] | int = (100, 100),
        activation: str = "relu",
        method: str = "auto",
        n_steps: int = 4,
        likelihood: Any = "auto",
        variance: str = "per_column",
        preprocess: str = "auto",
        max_iter: int = 200,
        n_iter_no_change: int | None = 20,
        batch_size: int = 64,
        learning_rate_init: float = 1e-3,
        validation_fraction: float = 0.1,
        n_importance_samples: int = 1000,
        image_shape: tuple[int, int, int] | None = None,
        config: Config | None = None,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.method = method
        self.n_steps = n_steps
        self.likelihood = likelihood
        self.variance = variance
        self.preprocess = preprocess
        self.max_iter = max_iter
        self.n_iter_no_change = n_iter_no_change
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.validation_fraction = validation_fraction
        self.n_importance_samples = n_importance_samples
        self.image_shape = image_shape
        self.config = config
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.non_deterministic = self.random_state is None
        return tags

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on the rows of X, (n_samples, n_features); y is ignored."""
        rows = self._rows(X, reset=True)
        with self._in_form_of_sklearn():
            columns = getattr(self, "feature_names_in_", None)
            examples = rows if self.image_shape is None else self._as_images(rows)
            config = self._config(examples)
            dataset = dataset_from_arrays(
                examples,
                validation_fraction=config.data.validation_fraction,
                columns=None if columns is None else tuple(map(str, columns)),
            )
            if find_method(config.inference.method).fit is None:
                self.trained_: Trained = fit(config, dataset)
            else:  # in closed form, to all rows
                self.trained_ = initialize(config, dataset._replace(train=examples))
        self.n_iter_ = max(1, round(self.trained_.provenance.epoch))
        self._n_features_out = self.trained_.config.model.latent
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The mean of each row's posterior, (n_samples, n_components)."""
        return self._encoded(X)["mean"]

    def posterior(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Means (n_samples, n_components) and covariances of the posteriors of the rows."""
        codes = self._encoded(X)
        return codes["mean"], codes["covariance"]

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Expected rows, (n_samples, n_features), of (n_samples, n_components) latent vectors."""
        check_is_fitted(self)
        codes = check_array(X, dtype=FLOAT_DTYPES)
        with self._in_form_of_sklearn():
            return _flat(uses.decode(self.trained_, codes), codes.dtype)

    def score_samples(self, X: Any) -> np.ndarray:
        """Estimate log p(x) of each row, (n_samples,), nats: low for outlying rows."""
        rows, examples = self._examples(X)
        with self._in_form_of_sklearn():
            found = uses.score(self.trained_, examples, keys=_keys_of(examples))
        return found["log_prob"].astype(rows.dtype)

    def score(self, X: Any, y: Any = None) -> float:
        """Estimate the mean of log p(x) over the rows, nats."""
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draw rows from the model, with the output's noise, (n_samples, n_features)."""
        check_is_fitted(self)
        with self._in_form_of_sklearn():
            drawn = uses.sample(self.trained_, n_samples, seed=_seed(random_state), draws=True)
        return _flat(drawn["draws"], np.float64)

    def impute(self, X: Any, *, return_std: bool = False) -> Any:
        """Fill in the missing entries by their means given the others.

        Args:
            X: Rows with NaN for missing entries.
            return_std: Also return the standard deviations of the entries, 0 for observed ones.

        Returns:
            Rows (n_samples, n_features), or a pair of such arrays.
        """
        rows, examples = self._examples(X)
        with self._in_form_of_sklearn():
            found = impute(self.trained_, examples).arrays
        # The observed entries as they came, not as float32 has them.
        expected = _flat(found[uses.name_of_examples(self.trained_)], rows.dtype)
        filled = np.where(np.isnan(rows), expected, rows)
        return (filled, _flat(found["std"], rows.dtype)) if return_std else filled

    def _encoded(self, X: Any) -> dict[str, np.ndarray]:
        rows, examples = self._examples(X)
        with self._in_form_of_sklearn():
            codes = uses.encode(self.trained_, examples)
        return {name: codes[name].astype(rows.dtype) for name in ("mean", "covariance")}

    def _examples(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """The rows as they came, and in the form of the model's examples."""
        check_is_fitted(self)
        rows = self._rows(X, reset=False)
        shape = self.trained_.provenance.image_shape
        return rows, rows.astype(np.float32).reshape(-1, *shape)

    def _rows(self, X: Any, *, reset: bool) -> np.ndarray:
        return validate_data(
            self,
            X,
            reset=reset,
            dtype=FLOAT_DTYPES,
            ensure_all_finite="allow-nan",
            ensure_min_samples=2 if reset else 1,
        )

    def _as_images(self, rows: np.ndarray) -> np.ndarray:
        shape = tuple(self.image_shape or ())
        if len(shape) != 3 or np.prod(shape) != rows.shape[1]:
            raise UserError(
                f"image_shape must be a height, width and channel whose product is the number of "
                f"columns, {rows.shape[1]}; got {shape}"
            )
        return rows.reshape(-1, *shape)

    def _config(self, examples: np.ndarray) -> Config:
        base = self.config or Config()
        if self.variance not in _VARIANCES:
            raise UserError(f"variance must be one of {list(_VARIANCES)}, got {self.variance!r}")
        rows = len(examples)
        held_out = max(1, round(self.validation_fraction * rows))
        if not 0 < self.validation_fraction < 1 or held_out >= rows:
            raise UserError(
                f"validation_fraction must lie between 0 and 1 and leave rows of the {rows} to "
                f"train on, got {self.validation_fraction}"
            )
        # As scikit-learn's networks: a number is one layer.
        hidden, method = tuple(np.atleast_1d(self.hidden_layer_sizes).tolist()), self.method
        if method == "auto":
            method = "vlae"
            is_gaussian = self.likelihood in ("auto", "gaussian") and not np.isnan(examples).any()
            if not hidden and is_gaussian and self.image_shape is None:
                method = {"per_column": "fa", "shared": "ppca"}.get(self.variance, method)
        is_fitted_at_once = find_method(method).fit is not None
        sections: Mapping[str, Mapping[str, Any]] = {
            "data": {
                "dataset": ARRAYS,
                "preprocess": self.preprocess,
                "validation_fraction": held_out / rows,
            },
            "model": {
                "latent": self.n_components,
                "hidden": hidden,
                "activation": self.activation,
                "likelihood": self.likelihood,
                "variance": _VARIANCES[self.variance],
                **({} if self.image_shape is None else {"network": "conv"}),
            },
            "inference": {"method": method, "steps": self.n_steps},
            "training": {
                "epochs": 0 if is_fitted_at_once else self.max_iter,
                "patience": self.n_iter_no_change,
                "batch_size": min(self.batch_size, rows - held_out),
                "learning_rate": self.learning_rate_init,
                "seed": _seed(self.random_state),
            },
            "evaluation": {
                "importance_samples": self.n_importance_samples,
                # Of a linear model the posterior is exact, and so is each weight.
                **({"proposal": "posterior"} if is_fitted_at_once else {}),
            },
        }
        return dataclasses.replace(
            base,
            **{
                name: dataclasses.replace(getattr(base, name), **fields)
                for name, fields in sections.items()
            },
        )

    @contextlib.contextmanager
    def _in_form_of_sklearn(self) -> Iterator[None]:
        """Silent unless verbose; mistakes in what the user gave are ValueErrors."""
        with contextlib.nullcontext() if self.verbose else silenced():
            try:
                yield
            except (UserError, RunFailure) as error:
                raise ValueError(str(error)) from error


def _flat(examples: np.ndarray, dtype: Any) -> np.ndarray:
    return np.asarray(examples, dtype).reshape(len(examples), -1)


def _seed(random_state: Any) -> int:
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def _keys_of(examples: np.ndarray) -> Array:
    """A random key for each example that depends on its content alone, not on its place."""
    contents = jnp.asarray([zlib.crc32(example.tobytes()) for example in examples], jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), contents)
