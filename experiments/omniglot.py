"""Every system on OMNIGLOT for the same epochs: Gaussian output on dequantised logits.

.venv/bin/python -m experiments.omniglot --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import SMALL, systems

STUDY = Study(
    "omniglot",
    "OMNIGLOT, equal epochs",
    systems((1, 4)),
    ["--dataset", "omniglot", *SMALL, "--epochs", "10"],
)

if __name__ == "__main__":
    main(STUDY)
