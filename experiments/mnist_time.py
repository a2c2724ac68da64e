"""Every system on MNIST for the same time, one CPU core each.

.venv/bin/python -m experiments.mnist_time --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import systems

STUDY = Study(
    "mnist_time",
    "MNIST, equal time",
    systems((1, 4)),
    [
        *("--dataset", "mnist", "--hidden", "200", "200", "--latent", "20"),
        *("--test-images", "1000", "--importance-samples", "1000", "--log-every", "1000"),
        *("--epochs", "1000", "--minutes", "4"),
    ],
)

if __name__ == "__main__":
    main(STUDY)
