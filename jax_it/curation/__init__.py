"""Instruction data from raw to ready: `jax-it data COMMAND`.

A *stage* is a frozen dataclass of settings (settings.py) and a function that plans how it treats records: see
`stage.py`, which also shows the smallest one. `STAGES` in stages.py names them all.

    input.py     the records of files in chunks that can be sent to other processes
    workers.py   a function over all chunks: in this process, in several, or on a Ray cluster
    run.py       a stage from input to output, with the manifest and the list of dropped records
    recipe.py    several stages one after another, resumable
    planned.py   what a stage that reads the records twice decided on each of them
    build/       new records with a model
"""
