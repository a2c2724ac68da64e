"""Output densities by name: against scipy, automatic differentiation, sums and integrals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from builders import tiny_config
from scipy import stats
from scipy.special import expit, logsumexp, softmax

import vlae_jax
from vlae_jax.analysis.imputation import impute
from vlae_jax.analysis.uses import reconstruct, sample, score
from vlae_jax.data.sets import dataset_from_arrays
from vlae_jax.errors import UserError
from vlae_jax.models.initial import initialize
from vlae_jax.models.likelihoods import Group, Output
from vlae_jax.runs.config import Config, DataConfig, EvaluationConfig, InferenceConfig, ModelConfig
from vlae_jax.runs.likelihoods import LIKELIHOODS, as_text, assigned

pytestmark = pytest.mark.usefixtures("quick_compile")
LEVELS, DF, SPREAD = 9, 4.0, -0.3


def inflated(pmf, logit):
    def log_prob(x):
        with np.errstate(divide="ignore"):
            zero = np.where(np.asarray(x) == 0, expit(logit), 0.0)
            return np.log(zero + expit(-logit) * np.exp(pmf.logpmf(x)))

    return log_prob


def nbinom(log_mean):
    size = np.exp(-SPREAD)
    return stats.nbinom(size, size / (size + np.exp(log_mean)))


def levels(eta):
    """Log probability of the levels of a logistic distribution between their midpoints."""
    edges = (np.arange(LEVELS + 1) - 0.5) / (LEVELS - 1)
    edges[0], edges[-1] = -np.inf, np.inf
    cells = np.diff(stats.logistic(eta[0], np.exp(SPREAD)).cdf(edges))
    return lambda x: np.log(cells[np.asarray(x, int)])


# Each: outputs a column, and (eta of a column) → log density of x.
TRUTHS = {
    "gaussian": (1, lambda e: stats.norm(e[0], np.exp(SPREAD / 2)).logpdf),
    "gaussian_heteroscedastic": (2, lambda e: stats.norm(e[0], np.exp(e[1] / 2)).logpdf),
    "student_t": (1, lambda e: stats.t(DF, e[0], np.exp(SPREAD)).logpdf),
    "bernoulli": (1, lambda e: stats.bernoulli(expit(e[0])).logpmf),
    "categorical": (LEVELS, lambda e: lambda x: np.log(softmax(e))[np.asarray(x, int)]),
    "poisson": (1, lambda e: stats.poisson(np.exp(e[0])).logpmf),
    "negative_binomial": (1, lambda e: nbinom(e[0]).logpmf),
    "zero_inflated_poisson": (2, lambda e: inflated(stats.poisson(np.exp(e[0])), e[1])),
    "zero_inflated_negative_binomial": (2, lambda e: inflated(nbinom(e[0]), e[1])),
    "discretized_logistic": (1, levels),
}
CONTINUOUS = ("gaussian", "gaussian_heteroscedastic", "student_t")
CONCAVE = {name: name not in ("student_t", "gaussian_heteroscedastic") for name in TRUTHS}
CONCAVE |= {"zero_inflated_poisson": False, "zero_inflated_negative_binomial": False}


def support(kind: str) -> np.ndarray:
    if kind in CONTINUOUS:
        return np.linspace(-60, 60, 40_001)
    return np.arange(
        {"bernoulli": 2, "categorical": LEVELS, "discretized_logistic": LEVELS}.get(kind, 400)
    )


def group(kind: str, columns: tuple[int, ...] = ()) -> Group:
    return Group(kind, columns, LEVELS, DF)


def etas(kind: str, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.4, 0.8, (TRUTHS[kind][0], n))


def entries(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    most = min(len(support(kind)), 6)
    return rng.normal(size=n) if kind in CONTINUOUS else rng.integers(0, most, n).astype(float)


def test_all_densities_have_a_truth():
    assert set(LIKELIHOODS) | {"gaussian_heteroscedastic"} == set(TRUTHS)


@pytest.mark.parametrize("kind", TRUTHS)
def test_log_densities_are_scipys(x64, kind):
    x, eta = entries(kind, 5), etas(kind, 5)
    expected = [TRUTHS[kind][1](eta[:, i])(x[i]) for i in range(5)]
    parameter = None if group(kind).parameter is None else jnp.asarray(SPREAD)
    found = group(kind).each(x, jnp.asarray(eta.reshape(-1)), parameter)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    whole = group(kind).log_prob(x, jnp.asarray(eta.reshape(-1)), parameter)
    np.testing.assert_allclose(whole, np.sum(expected), rtol=1e-9)


@pytest.mark.parametrize("kind", TRUTHS)
def test_curvature_is_the_hessian_or_the_expected_one(x64, kind):
    """E[-∇²log p] where the density is not log-concave, by summing over all values of x."""
    eta, parameter = etas(kind, 1, seed=2)[:, 0], jnp.asarray(SPREAD)
    assert group(kind).is_log_concave == CONCAVE[kind]

    def entry(x, eta):
        return group(kind).log_prob(x[None], eta, parameter)

    if CONCAVE[kind]:
        x = entries(kind, 1)
        expected = -jax.hessian(entry, argnums=1)(x[0], jnp.asarray(eta))
    else:
        x = support(kind).astype(float)
        step = x[1] - x[0]
        weights = np.exp(TRUTHS[kind][1](eta)(x)) * (step if kind in CONTINUOUS else 1.0)
        hessians = jax.vmap(jax.hessian(entry, argnums=1), in_axes=(0, None))(x, jnp.asarray(eta))
        assert np.linalg.eigvalsh(-hessians).min() < 0  # nowhere else would it matter
        expected = -np.einsum("n,nij->ij", weights, hessians)
    found = group(kind).information(x[:1], jnp.asarray(eta), parameter)[..., 0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.linalg.eigvalsh(found).min() > -1e-12


def test_the_decoder_gives_no_variance_below_the_floor(x64):
    floored = Group("gaussian_heteroscedastic", min_std=0.1)
    eta = jnp.asarray([0.3, 0.3, -20.0, -1.0])  # two means, two log variances
    x = jnp.asarray([0.35, 0.35])
    expected = stats.norm(0.3, [0.1, np.exp(-0.5)]).logpdf(0.35)
    np.testing.assert_allclose(floored.each(x, eta, None), expected)
    blocks = floored.information(x, eta, None)
    np.testing.assert_allclose(blocks[0, 0], [100.0, np.exp(1.0)])
    np.testing.assert_allclose(blocks[1, 1], [0.0, 0.5])


@pytest.mark.parametrize("kind", TRUTHS)
def test_draws_have_the_mean_and_the_cells_of_the_density(kind):
    eta = etas(kind, 1, seed=3)
    draws = 20_000
    many = jnp.asarray(np.repeat(eta, draws, axis=1), jnp.float32).reshape(-1)
    parameter = None if group(kind).parameter is None else jnp.float32(SPREAD)
    found = np.asarray(group(kind).draw(jax.random.key(0), many, parameter), np.float64)
    x = support(kind).astype(float)
    log_p = TRUTHS[kind][1](eta[:, 0])(x)
    p = np.exp(log_p - logsumexp(log_p))
    for value in np.quantile(found, [0.2, 0.5, 0.8]):
        below = p[x <= value].sum()
        assert abs((found <= value).mean() - below) < 4 * 0.5 / np.sqrt(draws) + 1e-3
    expected = group(kind).expected(jnp.asarray(eta, jnp.float32).reshape(-1), parameter)[0]
    if kind == "categorical":
        assert expected == np.argmax(p)
    elif kind not in ("student_t", "discretized_logistic"):  # whose tails are clipped in `support`
        np.testing.assert_allclose(expected, p @ x, rtol=1e-3, atol=1e-3)


def test_groups_take_their_columns_wherever_they_are(x64):
    groups = (Group("poisson", (3, 0)), Group("gaussian", (1,)), Group("categorical", (2,), 3))
    output = Output(groups, 4)
    assert output.sizes == (2, 1, 3) and output.seen_size == 6
    x = np.array([2.0, -0.5, 1.0, 4.0])
    eta = jnp.asarray([0.1, 0.7, 0.3, 0.0, 1.0, -1.0])
    parameters = [None, jnp.asarray(0.2), None]
    parts = [
        stats.poisson(np.exp(0.7)).logpmf(2),
        stats.norm(0.3, np.exp(0.1)).logpdf(-0.5),
        np.log(softmax([0.0, 1.0, -1.0]))[1],
        stats.poisson(np.exp(0.1)).logpmf(4),
    ]
    np.testing.assert_allclose(output.log_prob(x, eta, parameters), np.sum(parts))
    observed = np.array([True, False, True, False])
    gaps = jnp.where(observed, x, jnp.nan)
    names = ("log_prob", "slope", "blocks", "expected", "seen")

    @jax.jit
    def all_of(eta):
        log_prob, slope = jax.value_and_grad(output.log_prob, argnums=1)(
            gaps, eta, parameters, observed
        )
        blocks = output.information(gaps, eta, parameters, observed)
        seen = output.see(jnp.where(observed, x, 0.0), observed)
        return log_prob, slope, blocks, output.expected(eta, parameters), seen

    found = dict(zip(names, all_of(eta), strict=True))
    np.testing.assert_allclose(found["log_prob"], parts[0] + parts[2])
    assert np.isfinite(found["slope"]).all() and found["slope"][0] == found["slope"][2] == 0
    assert [block.shape for block in found["blocks"]] == [(1, 1, 2), (1, 1, 1), (3, 3, 1)]
    np.testing.assert_allclose(found["blocks"][0][0, 0], [0.0, np.exp(0.7)])
    np.testing.assert_allclose(found["expected"], [np.exp(0.7), 0.3, 1.0, np.exp(0.1)])
    np.testing.assert_allclose(found["seen"], [0.0, np.log(3), 0.0, 0.0, 1.0, 0.0])


# Models


def mixed_table(rows: int = 60) -> np.ndarray:
    """A count, a measurement, a class and an answer that depend on one hidden number."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=rows)
    count = rng.poisson(np.exp(1 + 0.5 * z))
    group = np.clip(np.round(1 + z + 0.3 * rng.normal(size=rows)), 0, 2)
    group[:3] = 0, 1, 2
    return np.stack(
        [count, 50 + 7 * z + rng.normal(size=rows), group, rng.random(rows) < expit(z)], 1
    )


MIXED = (("poisson", 1), ("gaussian", 1), ("categorical", 1), ("bernoulli", 1))


def config_for(likelihood, latent: int = 1, variance: str = "shared", **model) -> Config:
    config = tiny_config("vlae", epochs=1)
    changed = ModelConfig(latent=latent, likelihood=likelihood, variance=variance, **model)
    evaluation = EvaluationConfig(4000, "student_t", chunk_size=4000)
    inference = InferenceConfig(method="vlae", steps=4)
    return dataclasses.replace(config, model=changed, evaluation=evaluation, inference=inference)


def loud(trained, scale: float = 1.0):
    """The model with a decoder whose output depends on z: not as it is initialized."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf, trained.params)
    shape = params["head"]["kernel"][...].shape
    params["head"]["kernel"][...] = jnp.asarray(rng.normal(0, scale, shape), jnp.float32)
    return trained.with_params(params)


@pytest.mark.parametrize(
    ("likelihood", "variance", "latent"),
    [
        (MIXED, "shared", 1),
        ("student_t", "per_pixel", 1),
        ("gaussian", "heteroscedastic", 2),
        ((("zero_inflated_negative_binomial", 1), ("negative_binomial", 1)), "shared", 1),
        ((("zero_inflated_poisson", 1), ("discretized_logistic", 1)), "shared", 2),
    ],
)
def test_the_estimate_of_log_prob_is_the_integral(likelihood, variance, latent):
    """A linear decoder with one or two latent dimensions, in the data's own units."""
    if likelihood is MIXED:
        rows = mixed_table()
    elif isinstance(likelihood, str):
        rows = mixed_table()[:, [1]] * np.array([[1.0, -2.0]]) + np.random.default_rng(0).normal(
            size=(60, 2)
        )
    else:
        rows = np.random.default_rng(0).poisson(2.0, (60, 2)).astype(float)
    config = config_for(likelihood, latent, variance, hidden=())
    trained = loud(initialize(config, dataset_from_arrays(rows)), 0.5)
    new = rows[:3].copy()
    new[2, 0] = np.nan
    found = score(trained, new)
    model, preprocessor = trained.model, trained.preprocessor
    axis = np.linspace(-7, 7, 201 if latent == 2 else 4001)
    zs = np.stack(np.meshgrid(*[axis] * latent), -1).reshape(-1, latent)
    kernel, bias = (np.asarray(a[...], np.float64) for a in (model.head.kernel, model.head.bias))
    eta = zs @ kernel + bias
    shift, scale = (
        np.broadcast_to(np.asarray(a, np.float64), rows.shape[1])
        for a in (preprocessor.mean, preprocessor.scale)
    )
    for row, log_prob in zip(new, found["log_prob"], strict=True):
        x = (row - shift) / scale
        total, start = stats.norm.logpdf(zs).sum(axis=1), 0
        for part, parameter in zip(model.output.groups, model.parameters, strict=True):
            columns = part.columns or range(len(x))
            own = eta[:, start : start + part.outputs * len(columns)]
            own = own.reshape(len(zs), part.outputs, len(columns))
            start += part.outputs * len(columns)
            for place, column in enumerate(columns):
                if np.isnan(row[column]):
                    continue
                spread = (
                    None if parameter is None else np.broadcast_to(parameter, len(columns))[place]
                )
                total += log_density(part, own[:, :, place], x[column], spread)
                total -= np.log(scale[column])
        expected = logsumexp(total) + latent * np.log(axis[1] - axis[0])
        np.testing.assert_allclose(log_prob, expected, atol=0.05)


def log_density(part: Group, eta: np.ndarray, x: float, spread: float | None) -> np.ndarray:
    """Log density of one entry at many outputs eta (n, outputs), by scipy."""
    first, std = eta[:, 0], None if spread is None else np.exp(spread)
    if part.kind == "gaussian":
        return stats.norm.logpdf(x, first, np.sqrt(std))
    if part.kind == "gaussian_heteroscedastic":
        return stats.norm.logpdf(x, first, np.exp(eta[:, 1] / 2))
    if part.kind == "student_t":
        return stats.t.logpdf(x, part.df, first, std)
    if part.kind == "poisson":
        return stats.poisson.logpmf(x, np.exp(first))
    if part.kind == "bernoulli":
        return stats.bernoulli.logpmf(x, expit(first))
    if part.kind == "categorical":
        return np.log(softmax(eta, axis=1))[:, int(x)]
    if part.kind == "discretized_logistic":
        width = 1 / (part.classes - 1)
        low = -np.inf if x == 0 else x * width - width / 2
        high = np.inf if x == part.classes - 1 else x * width + width / 2
        return np.log(stats.logistic.cdf(high, first, std) - stats.logistic.cdf(low, first, std))
    if part.kind.endswith("poisson"):
        log_p, zero = (stats.poisson.logpmf(k, np.exp(first)) for k in (x, 0))
    else:
        size = 1 / std
        log_p, zero = (stats.nbinom.logpmf(k, size, size / (size + np.exp(first))) for k in (x, 0))
    if part.kind == "negative_binomial":
        return log_p
    share = expit(eta[:, 1])
    return np.log(share * (x == 0) + (1 - share) * np.exp(zero if x == 0 else log_p))


def test_a_mixed_frame_is_trained_saved_loaded_and_imputed(tmp_path):
    names = ("visits", "weight", "group", "ill")
    rows = mixed_table()
    frame = pa.table(dict(zip(names, rows.T, strict=True)))
    likelihood = {
        "categorical": ["group"],
        "poisson": "visits",
        "bernoulli": ["ill"],
        "gaussian": None,
    }
    config = config_for(likelihood, hidden=(6,))
    evaluation = EvaluationConfig(20, "posterior")
    trained = vlae_jax.fit(dataclasses.replace(config, evaluation=evaluation), frame)
    scale = np.asarray(trained.preprocessor.scale)
    assert (scale[[0, 2, 3]] == 1).all() and scale[1] != 1
    vlae_jax.save(trained, tmp_path / "model")
    loaded = vlae_jax.load(tmp_path / "model")
    assert loaded.provenance == trained.provenance
    new = rows[:6].copy()
    new[np.arange(4), np.arange(4)] = np.nan
    found = impute(loaded, new, num_samples=64, draws=64).arrays
    assert np.isfinite(found["rows"]).all()
    drawn = found["draws"][:, :, [0, 2, 3]]
    np.testing.assert_array_equal(drawn, np.round(drawn))
    assert drawn.min() >= 0 and drawn[..., 1].max() <= 2 and drawn[..., 2].max() <= 1
    again = reconstruct(loaded, new)["reconstructions"]
    assert np.isin(again[:, 2], [0, 1, 2]).all()
    drawn = sample(loaded, 5, seed=0, draws=True)["draws"]
    np.testing.assert_array_equal(drawn[:, 0], np.round(drawn[:, 0]))


def test_a_density_that_is_not_log_concave_has_its_fisher_information():
    """The precision of a linear decoder is I + K F Kᵀ, wherever the row lies."""
    rows = np.random.default_rng(0).normal(size=(60, 3))
    trained = loud(
        initialize(config_for("student_t", 2, hidden=()), dataset_from_arrays(rows)), 1.0
    )
    model = trained.model
    kernel, scale = np.asarray(model.head.kernel[...]), np.exp(float(model.parameters[0]))
    far = jnp.full(3, 50.0)  # there the Hessian is indefinite
    _, _, at = trained.observe(jax.random.key(0), far)
    expand, repair = at.expansions()
    found = jax.jit(lambda z: expand(z))(jnp.zeros(2))
    information = (DF + 2) / ((DF + 4) * scale**2)  # with the 5 degrees of freedom of the default
    expected = np.eye(2) + information * kernel @ kernel.T
    np.testing.assert_allclose(found.precision, expected, rtol=1e-4)
    assert repair is None


@pytest.mark.parametrize("likelihood", ["poisson", "discretized_logistic", "categorical"])
def test_pixels_may_be_counts(likelihood):
    """Quantized pixels have probabilities, which sum to one for a single pixel."""
    images = np.random.default_rng(0).integers(0, 5, (40, 1, 1, 1), np.uint8)
    config = config_for(likelihood, hidden=())
    trained = loud(initialize(config, dataset_from_arrays(images, levels=5)))
    assert trained.config.data.preprocess == "none"
    every = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    total = np.exp(score(trained, every)["log_prob"]).sum()
    if likelihood == "poisson":
        assert total < 1
    else:
        np.testing.assert_allclose(total, 1.0, atol=0.01)


def test_the_text_of_a_likelihood():
    assert as_text(MIXED) == "poisson:1,gaussian:1,categorical:1,bernoulli:1"
    text = as_text({"poisson": ["a, b", "c+d"], "gaussian": None})
    assert assigned(text, 3, ("x", "c+d", "a, b")) == [("poisson", (2, 1)), ("gaussian", (0,))]
    assert assigned("poisson:1,gaussian:2", 3, None) == [("poisson", (0,)), ("gaussian", (1, 2))]
    assert ModelConfig(likelihood=MIXED) == ModelConfig(likelihood=as_text(MIXED))


@pytest.mark.parametrize(
    ("likelihood", "of_tables", "of_pixels"),
    [
        ("auto", "standardize", "logit"),
        ("poisson", "none", "none"),
        ("bernoulli:1,categorical:2", "none", "a bernoulli likelihood needs binary images"),
        ((("poisson", 1), ("gaussian", 1)), "standardize", "a poisson likelihood needs whole"),
    ],
)
def test_preprocessing_fits_the_densities(likelihood, of_tables, of_pixels):
    config = Config(model=ModelConfig(likelihood=likelihood))
    assert config.for_data(pixels=False).data.preprocess == of_tables
    if of_pixels in ("logit", "none"):
        assert config.for_data(pixels=True).data.preprocess == of_pixels
        return
    with pytest.raises(UserError, match=of_pixels):
        config.for_data(pixels=True)


@pytest.mark.parametrize(
    ("likelihood", "said"),
    [
        ("poison", "unknown likelihood 'poison'; did you mean 'poisson'"),
        ("poisson,gaussian", "where one density may take the rest"),
        ("poisson:1,gaussian", "must count all columns"),
        ((("poisson", 1.5),), "likelihood must be a name"),
        ({"poisson": ["weight"], "gaussian": None}, "no names: count them|for the column 'weight'"),
        ("poisson:3", "gives 3 columns a density, and there are 4"),
        ("poisson:3,gaussian:2", "gives 5 columns a density, and there are 4"),
        ("poisson", r"poisson needs counts 0, 1, 2, \.\.\., and column 1 .* holds 5"),
        ("bernoulli", "bernoulli needs 0 and 1, and column 0"),
        ("categorical", "categorical needs whole numbers"),
        ("poisson:1,gaussian:3", None),
    ],
)
def test_likelihoods_that_do_not_fit(likelihood, said):
    if said is None:
        initialize(config_for(likelihood), dataset_from_arrays(mixed_table()))
        return
    with pytest.raises(UserError, match=said) as caught:
        initialize(config_for(likelihood), dataset_from_arrays(mixed_table()))
    assert "\n" not in str(caught.value)


def test_binary_pixels_need_a_binary_density():
    for preprocess, likelihood in (("logit", "bernoulli"), ("raw", "poisson")):
        with pytest.raises(UserError, match="needs"):
            Config(data=DataConfig(preprocess=preprocess), model=ModelConfig(likelihood=likelihood))
