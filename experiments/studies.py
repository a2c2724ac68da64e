"""The studies in one table: the variants of each, and the figures measured with them.

`python -m experiments --list` prints the table, `python -m experiments NAME` runs a study.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Options = Sequence[str]
"""Options of `vlae_jax train`."""

ASCENT = ("--ascent-rate", "1e-2")
CLIPPED = (*ASCENT, "--ascent-clip", "100")
"""For larger images, on which unclipped steps overshoot now and then, until one diverges."""
SMALL = (
    *("--hidden", "200", "200", "--latent", "20"),
    *("--test-images", "1000", "--importance-samples", "1000", "--log-every", "1000"),
)
"""A network and an evaluation small enough to train many of on two CPU cores."""
TO_CONVERGENCE = ("--epochs", "1000", "--patience", "60")
TWO_MINUTES = (
    *("--hidden", "200", "200", "--latent", "20", "--log-every", "1000"),
    *("--epochs", "1000", "--minutes", "2", "--test-images", "100"),
)
"""Two minutes of training, whatever the epochs, and an evaluation of few images by many samples."""
VAE, VLAE = ("--method", "vae"), ("--method", "vlae", "--steps", "4")


class Measured(NamedTuple):
    """The main result of a study, and the time that its runs took."""

    label: str
    """A variant; its test bounds are compared with those of its baseline."""
    elbo: float
    """ELBO less that of the baseline, nats per image."""
    log_prob: float
    """Estimated log p(x) less that of the baseline, nats per image."""
    minutes: int
    """Training of all runs on record, on a CPU core each."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Variants of `vlae_jax train` that are compared."""

    title: str
    variants: Mapping[str, Options]
    """Label → options; the first is the baseline that paired differences refer to."""
    common: Options
    """Options of all variants, before their own."""
    measured: Measured
    seeds: Sequence[int] = (0,)
    """Each variant is trained with each."""
    baselines: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Label → label of another baseline than the first variant."""
    shares: Sequence[str] = ()
    """Shares of images in the table besides those of every study."""
    command: Sequence[str] = ("-m", "vlae_jax", "train")
    """The command that takes the options, after the Python interpreter."""


def systems(
    steps: Sequence[int], *, ascent: Options = ASCENT, linear: bool = True
) -> dict[str, Options]:
    """Label → options of every system, the plain VAE first.

    Args:
        steps: T of the systems that take steps. VLAE also has T = 0, the Laplace posterior at the
            encoder's guess.
        ascent: Options of SA-VAE's ascent.
        linear: Also probabilistic PCA, which needs a Gaussian output.
    """
    found: dict[str, Options] = {"VAE": VAE}
    if linear:
        found["pPCA"] = ("--method", "ppca", "--hidden", "--epochs", "0")
    found["VAE+full"] = ("--method", "vae_full")
    for name, method in (("HF", "vae_hf"), ("IAF", "vae_iaf"), ("planar", "vae_planar")):
        found |= {f"VAE+{name} T={t}": ("--method", method, "--steps", str(t)) for t in steps}
    found |= {f"SA-VAE T={t}": ("--method", "sa_vae", "--steps", str(t), *ascent) for t in steps}
    found["IWAE K=5"] = (*VAE, "--objective", "iwae", "--train-samples", "5")
    found |= {f"VLAE T={t}": ("--method", "vlae", "--steps", str(t)) for t in (0, *steps)}
    found["VLAE T=4, steps of the paper"] = ("--method", "vlae", "--damping", "paper")
    return found


def of_every_kind(pretrain: int, ascent: Options = ASCENT) -> dict[str, Options]:
    """Label → options of one system of each kind, and VLAE with few and with more steps.

    Args:
        pretrain: Epochs as a VAE before VLAE takes over, about two thirds of the time.
        ascent: Options of SA-VAE's ascent.
    """
    found = systems((1, 4), ascent=ascent)
    labels = ("VAE", "VAE+full", "VAE+HF T=4", "VAE+IAF T=4", "SA-VAE T=4", "IWAE K=5")
    late = ("--method", "vlae", "--steps", "1", "--pretrain", str(pretrain))
    linear = ("--hidden", "--epochs", "0", "--method")
    return {
        "VAE": VAE,
        "pPCA": (*linear, "ppca"),
        "FA": (*linear, "fa", "--variance", "per_pixel"),
        **{label: found[label] for label in labels},
        "VAE+FIF": ("--method", "vae_fif"),
        "VAE+iter T=4": ("--method", "vae_iter", "--steps", "4"),
        "SA-VAE T=4, encoder by its own ELBO": (
            *("--method", "sa_vae", "--steps", "4", *ascent),
            *("--gradient", "stop", "--encoder-loss", "elbo"),
        ),
        **{label: found[label] for label in ("VLAE T=1", "VLAE T=4")},
        "VAE then VLAE T=1": late,
        "VAE then VLAE T=1, auto": (*late[:-1], "auto"),
    }


def objectives_and_gradients() -> dict[str, Options]:
    """Label → options of the other choices: objectives, gradients, searches."""
    iwae = (*VAE, "--train-samples")
    unroll = (*VLAE, "--gradient", "unroll")
    return {
        "IWAE K=50": (*iwae, "50", "--objective", "iwae"),
        "IWAE K=5 DReG": (*iwae, "5", "--objective", "dreg"),
        "SA-VAE T=4 stop": ("--method", "sa_vae", "--steps", "4", *ASCENT, "--gradient", "stop"),
        "VLAE T=4 stop": (*VLAE, "--gradient", "stop"),
        "VLAE T=4 unroll": unroll,
        "VLAE T=4 unroll, steps of the paper": (*unroll, "--damping", "paper"),
        "VLAE T=4 gradient ascent": (*VLAE, "--search", "gradient", *ASCENT),
        "VLAE T=4 evidence": (*VLAE, "--objective", "evidence"),
        "VLAE T=4 IWAE K=5": (*VLAE, "--objective", "iwae", "--train-samples", "5"),
    }


def refined() -> dict[str, Options]:
    """Label → options of training with a variational Gaussian in place of Laplace's."""
    one_step = ("--refine", "variational", "--refine-steps", "1", "--refine-samples", "4")
    return {
        "VLAE T=4": VLAE,
        "VAE": VAE,
        "VLAE T=4, refined": (*VLAE, *one_step),
        "VLAE T=4, refined and unrolled": (*VLAE, *one_step, "--gradient", "unroll"),
    }


FIVE_SEEDS = (0, 1, 2, 3, 4)
STUDIES: dict[str, Study] = {
    "digits": Study(
        "digits, to convergence",
        {**systems((1, 2, 4, 8)), **objectives_and_gradients()},
        ("--dataset", "digits", *TO_CONVERGENCE, "--log-every", "1000"),
        Measured("VLAE T=4", 1.5, -0.3, 229),
        seeds=FIVE_SEEDS,
    ),
    "digits_refined": Study(
        "digits, training with a refined posterior",
        refined(),
        ("--dataset", "digits", *TO_CONVERGENCE, "--log-every", "1000"),
        Measured("VLAE T=4, refined and unrolled", 0.9, 0.4, 21),
        baselines=dict.fromkeys(refined(), "VLAE T=4"),
    ),
    "mnist_refined": Study(
        "MNIST, training with a refined posterior, equal epochs",
        refined(),
        (
            *("--dataset", "mnist", "--hidden", "200", "200", "--latent", "20"),
            *("--epochs", "5", "--test-images", "100", "--log-every", "1000"),
        ),
        Measured("VLAE T=4, refined", -4.4, -5.4, 52),
        baselines=dict.fromkeys(refined(), "VLAE T=4"),
    ),
    "digits_newer": Study(
        "digits, newer systems and another prior",
        {
            "VAE": VAE,
            "VAE+FIF": ("--method", "vae_fif"),
            **{
                f"VAE+iter T={t}": ("--method", "vae_iter", "--steps", str(t)) for t in (1, 2, 4, 8)
            },
            "VAE, mixture prior": (*VAE, "--prior", "mixture"),
            "VLAE T=4": VLAE,
            "VLAE T=4, mixture prior": (*VLAE, "--prior", "mixture"),
            "VLAE T=1": ("--method", "vlae", "--steps", "1"),
            "VLAE T=1, stored modes": ("--method", "vlae", "--steps", "1", "--modes", "stored"),
        },
        ("--dataset", "digits", *TO_CONVERGENCE, "--log-every", "1000"),
        Measured("VAE, mixture prior", 1.1, 1.0, 19),
    ),
    "mnist_epochs": Study(
        "MNIST, equal epochs",
        systems((1, 4)),
        ("--dataset", "mnist", *SMALL, "--epochs", "5"),
        Measured("VLAE T=4", 44.6, 30.5, 29),
    ),
    "mnist_time": Study(
        "MNIST, equal time",
        of_every_kind(10),
        ("--dataset", "mnist", *TWO_MINUTES),
        Measured("VAE then VLAE T=1", 13.7, -9.3, 24),
    ),
    "mnist_binary": Study(
        "dynamically binarized MNIST, equal epochs",
        systems((1, 4), linear=False),
        ("--dataset", "mnist", *SMALL, "--preprocess", "dynamic_binary", "--epochs", "5"),
        Measured("VLAE T=4", 13.4, 10.4, 37),
    ),
    "omniglot": Study(
        "OMNIGLOT, equal epochs",
        systems((1, 4)),
        ("--dataset", "omniglot", *SMALL, "--epochs", "10"),
        Measured("VLAE T=4", 33.2, 23.5, 15),
    ),
    "omniglot_time": Study(
        "OMNIGLOT, equal time",
        of_every_kind(22),
        ("--dataset", "omniglot", *TWO_MINUTES),
        Measured("VAE then VLAE T=1", 11.9, -1.1, 21),
    ),
    "cifar10_subset": Study(
        "CIFAR10 subset, equal epochs",
        systems((1, 4), ascent=CLIPPED),
        ("--dataset", "cifar10_subset", *SMALL, "--epochs", "10"),
        Measured("VLAE T=4", 202.1, 175.3, 25),
    ),
    "cifar10_subset_time": Study(
        "CIFAR10 subset, equal time",
        of_every_kind(18, CLIPPED),
        ("--dataset", "cifar10_subset", *TWO_MINUTES),
        Measured("VLAE T=4", 145.2, 22.9, 17),
    ),
    "cifar10_subset_conv": Study(
        "CIFAR10 subset, convolutional networks, equal epochs",
        {
            "VAE": VAE,
            "SA-VAE T=4": ("--method", "sa_vae", "--steps", "4", *CLIPPED),
            "VLAE T=1": ("--method", "vlae", "--steps", "1"),
        },
        (
            *("--dataset", "cifar10_subset", *SMALL, "--epochs", "5"),
            *("--network", "conv", "--channels", "16", "32", "--hidden", "200"),
        ),
        Measured("VLAE T=1", -580.5, -521.6, 33),
    ),
    "gradients": Study(
        "MNIST, which gradient through the mode",
        {
            "VAE": VAE,
            "implicit": ("--gradient", "implicit"),
            "stop": ("--gradient", "stop"),
            "unroll": ("--gradient", "unroll"),
            "unroll, steps of the paper": ("--gradient", "unroll", "--damping", "paper"),
        },
        ("--dataset", "mnist", *SMALL, "--epochs", "4"),
        Measured("implicit", 44.8, 30.8, 12),
        shares=("unconverged",),
    ),
    "precision": Study(
        "MNIST, networks in bfloat16",
        {
            "VAE": VAE,
            "VAE, bfloat16": (*VAE, "--precision", "bfloat16"),
            "VLAE T=4": VLAE,
            "VLAE T=4, bfloat16": (*VLAE, "--precision", "bfloat16"),
        },
        ("--dataset", "mnist", *SMALL, "--epochs", "2"),
        Measured("VLAE T=4, bfloat16", 0.5, 0.5, 9),
        seeds=(0, 1),
        baselines={"VLAE T=4": "VLAE T=4", "VLAE T=4, bfloat16": "VLAE T=4"},
        shares=("unconverged",),
    ),
    "paper_screenshot": Study(
        "MNIST, the settings of the published curves, 5 epochs",
        {
            "VAE": VAE,
            # Conjugate gradients to rounding take the same steps in a third of the time on a CPU.
            "VLAE T=4": ("--method", "vlae", "--solver", "cg"),
            "SA-VAE T=4": ("--method", "sa_vae", *ASCENT),
            "VAE+HF T=4": ("--method", "vae_hf"),
            "VAE+IAF T=4": ("--method", "vae_iaf"),
            "VLAE T=4, implicit, line search": (
                *("--method", "vlae", "--gradient", "implicit"),
                *("--damping", "line_search", "--solver", "auto"),
            ),
        },
        (
            *("--preset", "paper-screenshot", "--epochs", "5"),
            *("--test-images", "1000", "--log-every", "1000"),
        ),
        Measured("VLAE T=4", 62.5, 44.2, 58),
    ),
    # The mistakes are made on purpose, in `experiments.repairs`.
    "repairs": Study(
        "what the published mistakes cost",
        {
            "VAE": VAE,
            "SA-VAE": ("--method", "sa_vae", *ASCENT),
            "SA-VAE, clipped at 5": ("--method", "sa_vae", *ASCENT, "--ascent-clip", "5"),
            "SA-VAE, descending": ("--method", "sa_vae_descending", *ASCENT),
            "SA-VAE, rate over the batch": ("--method", "sa_vae_batch_mean", *ASCENT),
            "SA-VAE, clip inverted": ("--method", "sa_vae_inverted_clip", *ASCENT),
            "SA-VAE, all three": ("--method", "sa_vae_all_three", *ASCENT),
            "VAE+IAF": ("--method", "vae_iaf"),
            "VAE+IAF, blind to the image": ("--method", "vae_iaf_blind"),
        },
        (
            *("--dataset", "digits", "--steps", "4", *TO_CONVERGENCE),
            *("--batch-size", "64", "--log-every", "1000"),
        ),
        Measured("SA-VAE, descending", -2.5, -2.1, 35),
        seeds=FIVE_SEEDS,
        command=("-m", "experiments.repairs", "train"),
    ),
}
