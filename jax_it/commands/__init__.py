"""The commands, one module each: `add_arguments(parser)` and `run(options)`, called by cli.py.

`jax-it --help` imports all of them, so what is slow to import, such as JAX, is imported inside `run`.
"""
