"""`python -m jax_it` is the command `jax-it`."""

from jax_it.cli import main

main()
