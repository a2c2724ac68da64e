"""The settings of the published MNIST curves, for 5 of their 2,000 epochs.

.venv/bin/python -m experiments.paper_screenshot --data-dir PATH --jobs 2
"""

from experiments.study import Study, main
from experiments.systems import ASCENT

STUDY = Study(
    "paper_screenshot",
    "MNIST, the settings of the published curves, 5 epochs",
    {
        "VAE": ["--method", "vae"],
        # Conjugate gradients to rounding take the same steps, in a third of the time on a CPU.
        "VLAE T=4": ["--method", "vlae", "--solver", "cg"],
        "SA-VAE T=4": ["--method", "sa_vae", *ASCENT],
        "VAE+HF T=4": ["--method", "vae_hf"],
        "VAE+IAF T=4": ["--method", "vae_iaf"],
        "VLAE T=4, implicit, line search": [
            *("--method", "vlae", "--gradient", "implicit"),
            *("--damping", "line_search", "--solver", "auto"),
        ],
    },
    [
        *("--preset", "paper-screenshot", "--epochs", "5"),
        *("--test-images", "1000", "--log-every", "1000"),
    ],
)

if __name__ == "__main__":
    main(STUDY)
