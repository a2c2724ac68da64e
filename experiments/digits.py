"""Every system on scikit-learn's 8 x 8 digits, to convergence, five seeds.

.venv/bin/python -m experiments.digits --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import objectives_and_gradients, systems

STUDY = Study(
    "digits",
    "digits, to convergence",
    {**systems((1, 2, 4, 8)), **objectives_and_gradients()},
    ["--dataset", "digits", "--epochs", "1000", "--patience", "60", "--log-every", "1000"],
    seeds=(0, 1, 2, 3, 4),
)

if __name__ == "__main__":
    main(STUDY)
