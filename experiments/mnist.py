"""VAE against VLAE on MNIST, Gaussian output on dequantised logits, the paper's network, 8 epochs.

.venv/bin/python -m experiments.mnist
"""

from experiments.study import main

if __name__ == "__main__":
    main(
        "mnist",
        {"VAE": ["--method", "vae"], "VLAE T=4": ["--steps", "4", "--solver", "cholesky"]},
        ["--dataset", "mnist", "--epochs", "8", "--test-images", "2000"],
    )
