"""Every system on dynamically binarised MNIST, Bernoulli output, for the same epochs.

.venv/bin/python -m experiments.mnist_binary --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import SMALL, systems

STUDY = Study(
    "mnist_binary",
    "dynamically binarised MNIST, equal epochs",
    systems((1, 4), linear=False),
    ["--dataset", "mnist", *SMALL, "--preprocess", "dynamic_binary", "--epochs", "5"],
)

if __name__ == "__main__":
    main(STUDY)
