"""Predictions and their references, of which some have several, for tests of more than one metric."""

PREDICTIONS = [
    "The dog bit the man.",
    "It wasn't surprising.",
    "The man had just bitten him.",
    "",
    "Dogs running\nCats asleep",
]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
    ["Nothing was said.", "Silence."],
    ["A cat sleeps\nThe dog runs", "The dogs run"],
]
RAGGED = [
    REFERENCES[0],
    REFERENCES[1][:1],
    [*REFERENCES[2], "He was bitten by the man."],
    REFERENCES[3][1:],
    REFERENCES[4],
]
