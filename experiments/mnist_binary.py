"""Every system on dynamically binarised MNIST, Bernoulli output, for the same epochs.

.venv/bin/python -m experiments.mnist_binary --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import systems

STUDY = Study(
    "mnist_binary",
    "dynamically binarised MNIST, equal epochs",
    systems((1, 4), linear=False),
    [
        *("--dataset", "mnist", "--hidden", "200", "200", "--latent", "20"),
        *("--test-images", "1000", "--importance-samples", "1000", "--log-every", "1000"),
        *("--preprocess", "dynamic_binary", "--epochs", "5"),
    ],
)

if __name__ == "__main__":
    main(STUDY)
