"""Networks that train in bfloat16 against float32 on MNIST, for VAE and VLAE.

.venv/bin/python -m experiments.precision --data-dir PATH
"""

from experiments.study import Study, main
from experiments.systems import SMALL

VAE, VLAE = ["--method", "vae"], ["--method", "vlae", "--steps", "4"]
SHORT = ["--precision", "bfloat16"]
STUDY = Study(
    "precision",
    "MNIST, networks in bfloat16",
    {
        "VAE": VAE,
        "VAE, bfloat16": [*VAE, *SHORT],
        "VLAE T=4": VLAE,
        "VLAE T=4, bfloat16": [*VLAE, *SHORT],
    },
    ["--dataset", "mnist", *SMALL, "--epochs", "2"],
    seeds=(0, 1),
    baselines={"VLAE T=4": "VLAE T=4", "VLAE T=4, bfloat16": "VLAE T=4"},
    shares=["unconverged"],
)

if __name__ == "__main__":
    main(STUDY)
