"""Every system on 10,000 images of CIFAR10 for the same time, one CPU core each.

.venv/bin/python -m experiments.cifar10_subset_time --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import CLIPPED, FOUR_MINUTES, SMALL, systems

STUDY = Study(
    "cifar10_subset_time",
    "CIFAR10 subset, equal time",
    systems((1, 4), ascent=CLIPPED),
    ["--dataset", "cifar10_subset", *SMALL, *FOUR_MINUTES],
)

if __name__ == "__main__":
    main(STUDY)
