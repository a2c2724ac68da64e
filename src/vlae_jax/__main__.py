"""`python -m vlae_jax`."""

from vlae_jax.cli import main

if __name__ == "__main__":
    main()
