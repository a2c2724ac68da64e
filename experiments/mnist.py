"""VAE against VLAE on MNIST, Gaussian output on dequantised logits, the paper's network, 8 epochs.

.venv/bin/python -m experiments.mnist --data-dir PATH
"""

from experiments.study import Study, main

STUDY = Study(
    "mnist",
    "MNIST, the paper's network",
    {"VAE": ["--method", "vae"], "VLAE T=4": ["--steps", "4", "--solver", "cholesky"]},
    ["--dataset", "mnist", "--epochs", "8", "--test-images", "2000"],
)

if __name__ == "__main__":
    main(STUDY)
