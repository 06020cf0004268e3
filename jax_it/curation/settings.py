"""The settings of all stages: on the command line --keep-by, in a recipe `keep_by`. Light to import, for the parser.

A new stage is a dataclass here, a module with its `plan`, and a line in `STAGES` of stages.py.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Part = Literal["prompt", "completion", "both"]


def setting(default: Any, help: str, reads: bool = False) -> Any:
    """Return a field with its default and the text of `--help`; `reads`: it names files to read."""
    return field(default=default, metadata={"help": help, "reads": reads})


@dataclass(frozen=True)
class Validate:
    """Find the faults of all records: what cannot be read or rendered, broken text, empty prompts and completions."""

    fix: bool = setting(False, "mend mojibake, control characters and surrogates; records that stay faulty are dropped")
    tokenizer: str = setting("", "a folder, file or hub name: also find what this tokenizer loses or does not know")
    max_tokens: int = setting(2048, "with a tokenizer: records with more tokens than this have a fault")


@dataclass(frozen=True)
class Dedup:
    """Drop records that say the same as another."""

    method: Literal["exact", "near", "semantic"] = setting(
        "near", "exact: the same text but for case and spacing; near: or similar words; semantic: or similar meaning"
    )
    on: Part = setting("both", "what is compared")
    keep: str = setting("first", "which record of a group stays: first, longest, or best:FIELD for the largest number")
    threshold: float = setting(0.72, "for near: share of word 5-grams that two texts have in common, from which on")
    model: str = setting(
        "", "for semantic: a run, a Transformers folder or a hub name, whose encoder states are compared"
    )
    semantic_threshold: float = setting(0.95, "for semantic: cosine of two texts' mean states, from which on")


@dataclass(frozen=True)
class Convert:
    """Rewrite records in another shape or file format."""

    to: Literal["same", "prompt_completion", "alpaca", "messages", "sharegpt"] = setting(
        "same", "the shape: {prompt, completion}, {instruction, input, output}, {messages} or {conversations}"
    )
    keep_fields: bool = setting(False, "keep the fields that are not part of the old shape, such as id and task")


@dataclass(frozen=True)
class Stats:
    """Describe data sets: lengths, tasks, languages, turns, duplicates, what instructions begin with."""

    task: str = setting("task", "the field that names a record's task")
    json: str = setting("", "a file for the figures as JSON")
    html: str = setting("", "a file for a page with the figures and plots")


@dataclass(frozen=True)
class Decontaminate:
    """Find records that contain texts of evaluation sets, and drop or mark them."""

    against: tuple[str, ...] = setting(
        (), "evaluation sets: files, hub data sets (NAME or NAME:SPLIT), benchmark recipes", reads=True
    )
    against_fields: tuple[str, ...] = setting((), "only these fields of the evaluation sets")
    mark: bool = setting(False, "keep such records, with what they contain in the field 'contaminated_by'")


@dataclass(frozen=True)
class Filter:
    """Keep records by length, language, patterns, personal data, unsafe words, loss, IFD and a classifier."""

    on: Part = setting("both", "the text that lengths, languages and patterns are about")
    min_characters: int = setting(0, "the fewest characters")
    max_characters: int = setting(0, "the most; 0: no limit")
    min_words: int = setting(0, "the fewest words; each character of Chinese, Japanese, Thai, … is one")
    max_words: int = setting(0, "the most; 0: no limit")
    min_tokens: int = setting(0, "the fewest tokens of --tokenizer")
    max_tokens: int = setting(0, "the most; 0: no limit")
    tokenizer: str = setting("", "a folder or hub name, for --min-tokens and --max-tokens")
    languages: tuple[str, ...] = setting((), "keep texts in these languages: codes such as en de")
    match: str = setting("", "keep texts in which this regular expression is found")
    exclude: str = setting("", "drop texts in which this regular expression is found")
    personal_data: tuple[str, ...] = setting((), "find all, or some of: email phone card iban key")
    phone_region: str = setting("US", "the country whose phone numbers need no country code")
    unsafe: bool = setting(False, "find unsafe words")
    unsafe_words: str = setting("", "a file with your own list of them, one on each line", reads=True)
    redact: bool = setting(False, "replace personal data and unsafe words, do not drop their records")
    model: str = setting("", "a run directory, a Transformers or PEFT folder or a hub name, for the scores below")
    min_loss: float = setting(
        0.0, "the lowest loss of the answer, in nats per token; its exponential is the perplexity"
    )
    max_loss: float = setting(0.0, "the highest; 0: no limit")
    min_ifd: float = setting(0.0, "the lowest IFD score: the answer's loss behind its prompt, by that without")
    max_ifd: float = setting(0.0, "the highest; 0: no limit. At 1 the prompt does not help the model")
    classifier: str = setting("", "the same kinds of model: drop what it calls unsafe, as Llama Guard does")
    classifier_prompt: str = setting(
        "", "a Jinja file of prompt, completion or messages that it answers (default: its chat template)", reads=True
    )
    classifier_labels: tuple[str, ...] = setting(
        ("unsafe", "safe"), "its answers, first the unsafe one (default: unsafe safe)"
    )
    max_unsafe_probability: float = setting(0.5, "the highest, of the first label among all")
    keep_scores: bool = setting(False, "add the scores of the models to the records, in the field 'scores'")
    max_seq_length: int = setting(
        2048, "tokens of an example that are scored; a longer one is cut, and for --classifier dropped"
    )
    batch_size: int = setting(16, "examples that are scored at a time")


@dataclass(frozen=True)
class Sample:
    """Take some of the records: at random, by task, the most diverse, or one part of a split."""

    number: int = setting(0, "how many records; or give --share")
    share: float = setting(0.0, "the share of all records, from 0 to 1")
    stratify: str = setting("", "a field, such as task, whose values keep their shares")
    diverse: bool = setting(False, "take records that are far apart (k-centre greedy), not at random")
    on: Part = setting("prompt", "the text that --diverse and --split compare")
    model: str = setting("", "for --diverse: the model whose mean hidden state compares texts (default: hashed words)")
    split: Literal["", "train", "validation", "test"] = setting(
        "", "take this part of a split whose parts share no near-duplicates"
    )
    validation: float = setting(0.05, "the share of records for validation")
    test: float = setting(0.05, "the share of records for test")
    seed: int = setting(0, "another one takes other records")


@dataclass(frozen=True)
class Build:
    """Make new records with a model: new instructions, harder ones, answers, translations."""

    method: Literal["self_instruct", "evol_instruct", "answers", "translate"] = setting("answers", "what to make")
    endpoint: str = setting("", "the URL of an OpenAI-style API, such as http://localhost:8000/v1")
    model: str = setting("", "the model's name at the endpoint; without one, a folder, run directory or hub name")
    judge_model: str = setting("", "the model at the endpoint that chooses among candidates (default: --model)")
    api_key_env: str = setting("", "the environment variable that holds the API key")
    journal: str = setting("", "the file in which answers are kept, so that none is asked for twice")
    number: int = setting(100, "self_instruct: how many new instructions")
    rounds: int = setting(1, "evol_instruct: how often an instruction is rewritten")
    candidates: int = setting(1, "answers: how many are drawn for each prompt, of which a judge chooses one")
    language: str = setting("", "translate: the language's name, such as German")
    temperature: float = setting(0.7, "of instructions and candidates; one answer and translations are greedy")
    max_new_tokens: int = setting(1024, "of an answer; one that is cut there is dropped")
    concurrency: int = setting(16, "requests to the endpoint at a time")
    timeout: float = setting(600.0, "seconds that the endpoint may take for an answer")
    input_price: float = setting(0.0, "the price of a million prompt tokens, for the report")
    output_price: float = setting(0.0, "the price of a million generated tokens")
    batch_size: int = setting(32, "texts that a local model generates at a time")
    seed: int = setting(0, "of what is shown to the model and of its samples")


SETTINGS: dict[str, type] = {
    "validate": Validate,
    "dedup": Dedup,
    "decontaminate": Decontaminate,
    "filter": Filter,
    "sample": Sample,
    "build": Build,
    "convert": Convert,
}
