"""VAE against VLAE on scikit-learn's 8 x 8 digits, to convergence, 3 seeds.

.venv/bin/python -m experiments.digits
"""

from experiments.study import main

if __name__ == "__main__":
    main(
        "digits",
        {
            "VAE": ["--method", "vae"],
            "VLAE T=4": ["--steps", "4"],
        },
        ["--dataset", "digits", "--epochs", "400"],
        seeds=(0, 1, 2),
    )
