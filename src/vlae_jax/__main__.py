"""Entry point of `python -m vlae_jax`."""

from vlae_jax.commands.main import main

if __name__ == "__main__":
    main()
