"""The systems that the studies compare, as options of `vlae_jax train`."""

from collections.abc import Sequence

ASCENT = ("--ascent-rate", "1e-2")
CLIPPED = (*ASCENT, "--ascent-clip", "100")
"""For larger images, on which unclipped steps now and then overshoot, until one diverges."""
SMALL = (
    *("--hidden", "200", "200", "--latent", "20"),
    *("--test-images", "1000", "--importance-samples", "1000", "--log-every", "1000"),
)
"""A network, and an evaluation, that two CPU cores can train many of."""

FOUR_MINUTES = ("--epochs", "1000", "--minutes", "4")
"""Of training, and no other end."""


def systems(
    steps: Sequence[int], *, ascent: Sequence[str] = ASCENT, linear: bool = True
) -> dict[str, list[str]]:
    """Label → options of every system, the plain VAE first.

    Args:
        steps: T of those that take steps. VLAE also has T = 0: the Laplace posterior at the
            encoder's guess.
        ascent: How SA-VAE ascends.
        linear: Also probabilistic PCA, which needs a Gaussian output.
    """
    found = {"VAE": ["--method", "vae"]}
    if linear:
        found["pPCA"] = ["--method", "ppca", "--hidden", "--epochs", "0"]
    found["VAE+full"] = ["--method", "vae_full"]
    for name, method in (("HF", "vae_hf"), ("IAF", "vae_iaf"), ("planar", "vae_planar")):
        found |= {f"VAE+{name} T={t}": ["--method", method, "--steps", str(t)] for t in steps}
    found |= {f"SA-VAE T={t}": ["--method", "sa_vae", "--steps", str(t), *ascent] for t in steps}
    found["IWAE K=5"] = ["--method", "vae", "--objective", "iwae", "--train-samples", "5"]
    found |= {f"VLAE T={t}": ["--method", "vlae", "--steps", str(t)] for t in (0, *steps)}
    found["VLAE T=4, steps of the paper"] = ["--method", "vlae", "--damping", "paper"]
    return found


def objectives_and_gradients(*, ascent: Sequence[str] = ASCENT) -> dict[str, list[str]]:
    """Label → options of what else can be chosen: objectives, gradients, searches."""
    iwae = ["--method", "vae", "--train-samples"]
    semi = ["--method", "sa_vae", "--steps", "4", *ascent]
    vlae = ["--method", "vlae", "--steps", "4"]
    unroll = [*vlae, "--gradient", "unroll"]
    return {
        "IWAE K=50": [*iwae, "50", "--objective", "iwae"],
        "IWAE K=5 DReG": [*iwae, "5", "--objective", "dreg"],
        "SA-VAE T=4 stop": [*semi, "--gradient", "stop"],
        "VLAE T=4 stop": [*vlae, "--gradient", "stop"],
        "VLAE T=4 unroll": unroll,
        "VLAE T=4 unroll, steps of the paper": [*unroll, "--damping", "paper"],
        "VLAE T=4 gradient ascent": [*vlae, "--search", "gradient", *ascent],
        "VLAE T=4 evidence": [*vlae, "--objective", "evidence"],
        "VLAE T=4 IWAE K=5": [*vlae, "--objective", "iwae", "--train-samples", "5"],
    }
