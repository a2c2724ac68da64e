"""Entry point of `python -m vlae_jax`."""

from vlae_jax_command import main

if __name__ == "__main__":
    main()
