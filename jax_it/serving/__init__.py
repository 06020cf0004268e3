"""An OpenAI-compatible HTTP server over `generation.Scheduler`: the served text is the text that `generate` gives.

A request goes through, in this order:

    guard.py        its key, its time limit, its line in the access log           on the event loop
    app.py          its route
    schemas.py      the fields that it may have
    prompts.py      a prompt or a conversation to token ids, as `jax-it generate` does it
    admission.py    limits, and settings as the engine takes them
    worker.py       the threads that own engines and schedulers                   JAX is used here alone
    streaming.py    what comes from there, as events or as a whole                on the event loop
    detokenizer.py  token ids to text, as much of it as no later token changes
    responses.py    texts to OpenAI's objects
"""
