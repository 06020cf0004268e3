"""An OpenAI-compatible HTTP server over `generation.Scheduler`: the served text is the text that `generate` gives.

A request goes through, in this order:

    app.py          routes, keys, limits and errors                               on the event loop
    schemas.py      the fields that a request may have
    prompts.py      a prompt or a conversation to token ids, as `jax-it generate` does it
    worker.py       the one thread that owns engines and schedulers               JAX is used here alone
    detokenizer.py  token ids to text, as much of it as no later token changes    on the event loop
    responses.py    texts to OpenAI's objects, whole or in chunks
"""
