"""Every system on MNIST for the same time, one CPU core each.

.venv/bin/python -m experiments.mnist_time --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import FOUR_MINUTES, SMALL, systems

STUDY = Study(
    "mnist_time",
    "MNIST, equal time",
    systems((1, 4)),
    ["--dataset", "mnist", *SMALL, *FOUR_MINUTES],
)

if __name__ == "__main__":
    main(STUDY)
