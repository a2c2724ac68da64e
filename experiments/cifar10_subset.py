"""Every system on 10,000 images of CIFAR10 for the same epochs: Gaussian output on logits.

.venv/bin/python -m experiments.cifar10_subset --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import CLIPPED, SMALL, systems

STUDY = Study(
    "cifar10_subset",
    "CIFAR10 subset, equal epochs",
    systems((1, 4), ascent=CLIPPED),
    ["--dataset", "cifar10_subset", *SMALL, "--epochs", "10"],
)

if __name__ == "__main__":
    main(STUDY)
