"""Every system on MNIST for the same epochs: Gaussian output on dequantised logits.

.venv/bin/python -m experiments.mnist_epochs --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import SMALL, systems

STUDY = Study(
    "mnist_epochs",
    "MNIST, equal epochs",
    systems((1, 4)),
    ["--dataset", "mnist", *SMALL, "--epochs", "5"],
)

if __name__ == "__main__":
    main(STUDY)
