"""The three gradients through the mode on MNIST, equal epochs: 200-200 hidden, latent 20, T = 4.

.venv/bin/python -m experiments.gradients --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import SMALL

STUDY = Study(
    "gradients",
    "MNIST, which gradient through the mode",
    {
        "VAE": ["--method", "vae"],
        "implicit": ["--gradient", "implicit"],
        "stop": ["--gradient", "stop"],
        "unroll": ["--gradient", "unroll"],
        "unroll, steps of the paper": ["--gradient", "unroll", "--damping", "paper"],
    },
    ["--dataset", "mnist", *SMALL, "--epochs", "4"],
    shares=["unconverged"],
)

if __name__ == "__main__":
    main(STUDY)
