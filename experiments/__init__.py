"""Studies: each a module that runs its experiments and prints their table."""
