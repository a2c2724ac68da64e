"""Every system on 10,000 images of CIFAR10 for the same epochs: Gaussian output on logits.

.venv/bin/python -m experiments.cifar10_subset --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import systems

STUDY = Study(
    "cifar10_subset",
    "CIFAR10 subset, equal epochs",
    # Unclipped, steps of ascent now and then overshoot on these larger images, until one diverges.
    systems((1, 4), ascent=("--ascent-rate", "1e-2", "--ascent-clip", "100")),
    [
        *("--dataset", "cifar10_subset", "--hidden", "200", "200", "--latent", "20"),
        *("--test-images", "1000", "--importance-samples", "1000", "--log-every", "1000"),
        *("--epochs", "10"),
    ],
)

if __name__ == "__main__":
    main(STUDY)
