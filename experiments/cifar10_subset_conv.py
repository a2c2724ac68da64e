"""Convolutional networks on 10,000 images of CIFAR10, equal epochs: Gaussian output on logits.

.venv/bin/python -m experiments.cifar10_subset_conv --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import CLIPPED, SMALL

STUDY = Study(
    "cifar10_subset_conv",
    "CIFAR10 subset, convolutional networks, equal epochs",
    {
        "VAE": ["--method", "vae"],
        "SA-VAE T=4": ["--method", "sa_vae", "--steps", "4", *CLIPPED],
        "VLAE T=1": ["--method", "vlae", "--steps", "1"],
    },
    [
        *("--dataset", "cifar10_subset", *SMALL, "--epochs", "5"),
        *("--network", "conv", "--channels", "16", "32", "--hidden", "200"),
    ],
)

if __name__ == "__main__":
    main(STUDY)
