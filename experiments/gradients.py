"""The three gradients through the mode on MNIST, equal epochs: 200-200 hidden, latent 20, T = 4.

.venv/bin/python -m experiments.gradients --data-dir PATH
"""

from experiments.study import Study, main

STUDY = Study(
    "gradients",
    "which gradient through the mode",
    {
        "VAE": ["--method", "vae"],
        "implicit": ["--gradient", "implicit"],
        "stop": ["--gradient", "stop"],
        "unroll": ["--gradient", "unroll"],
        "unroll, steps of the paper": ["--gradient", "unroll", "--damping", "paper"],
    },
    [
        *("--dataset", "mnist", "--hidden", "200", "200", "--latent", "20"),
        *("--steps", "4", "--epochs", "4", "--test-images", "1000"),
        *("--importance-samples", "1000"),
    ],
)

if __name__ == "__main__":
    main(STUDY)
