"""A small instruction set that is generated here: the quickstart needs no download.

Five families, in plain English of some 300 words, that a T5 of one to three million random weights learns in
minutes on a laptop, and that still read as instructions do. One example of each, prompt -> completion:

    summarisation       Write a headline for this story. It was cold. Anna went to the market. There she bought a
                        red lamp. Later she told her brother about it.
                        -> Anna buys a red lamp at the market.
    translation         Translate into German: The young king finds the blue hat.
                        -> Der junge König findet den blauen Hut.
    question_answering  Ben had soup and tea on Friday. Then he took the red cup from the kitchen to the hall.
                        Question: Where is the cup now? Answer:
                        -> the hall
    dialogue            Reply politely to the customer. Customer: My name is Clara and I want to book a table for
                        four on Friday.
                        -> Of course, Clara. Your table for four on Friday is booked.
    code                Write a one-line Python function total(prices) that returns the sum of the squares of the
                        prices that are greater than 5.
                        -> def total(prices): return sum(x * x for x in prices if x > 5)

An example has a *content*, what is said whatever the wording: who bought what where, the English sentence,
the facts. A hash of the content decides its split, so that no test content is in the training split of any
seed, while each of its words is: what is held out are combinations.
"""

import hashlib
import random
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from jax_it.errors import UserError

FAMILIES = ("summarisation", "translation", "question_answering", "dialogue", "code")
SIZES = {"train": 2400, "test": 100}  # examples of each family

# A wording more is a line more. The fields are those of the family's function below.
PROMPTS = {
    "summarisation": (
        "Write a headline for this story. {story}",
        "Summarise in one sentence: {story}",
        "{story} What is the story about? Answer in one sentence.",
        "Read the story and say in a few words what happened. Story: {story} Summary:",
    ),
    "translation": (
        "Translate into {language}: {english}",
        "{english} How do you say this in {language}?",
        "Give the {language} translation of this sentence. {english}",
        "English: {english} {language}:",
    ),
    "question_answering": (
        "{context} Question: {question} Answer:",
        "Read the text and answer the question. Text: {context} Question: {question}",
        "{question} Use the following text. {context}",
        "Answer from the text alone. {context} {question}",
    ),
    "dialogue": (
        "Reply politely to the customer. Customer: {turn}",
        "You are a helpful assistant. User: {turn} Assistant:",
        "What is a good answer to this message? {turn}",
    ),
    "code": (
        "Write a one-line Python function {signature} that returns {result}.",
        "Complete the Python function {signature}. It returns {result}.",
        "I need {result}. Give me a Python function {signature} for it.",
        "In Python, define {signature} so that it returns {result}.",
    ),
}

PRONOUNS = {  # of the people in stories: subject, possessive
    **dict.fromkeys(("Anna", "Maria", "Lucy", "Nina", "Clara", "Emma"), ("she", "her")),
    **dict.fromkeys(("Tom", "Ben", "Paul", "Max", "Leo", "Jack"), ("he", "his")),
}
NAMES = tuple(PRONOUNS)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

EVENT = "{name} went to the {place}. There {she} {past} a {colour} {thing}."
HEADLINE = "{name} {present} a {colour} {thing} {where} the {place}."
OPENINGS = ("It was cold.", "It was a sunny day.", "It rained all day.", *(f"It was {day}." for day in DAYS))
ENDS = (
    "Later {she} told {her} brother about it.",
    "In the evening {she} met {her} mother.",
    "{Her} sister was waiting at home.",
    "It was a long day.",
)
ACTIONS = {"bought": "buys", "sold": "sells", "found": "finds", "lost": "loses", "broke": "breaks", "saw": "sees"}
PLACES = {"market": "at", "station": "at", "airport": "at", "park": "in", "museum": "in", "garden": "in", "beach": "on"}

# The nouns start with consonants in French, where le and la would lose their vowel, and are no weak masculines
# as objects in German, where they would take an ending; so nouns never change and articles and adjectives do.
PEOPLE = {  # English: German, its article, French, its article
    "boy": ("Junge", "der", "garçon", "le"),
    "girl": ("Mädchen", "das", "fille", "la"),
    "woman": ("Frau", "die", "femme", "la"),
    "doctor": ("Arzt", "der", "médecin", "le"),
    "cook": ("Koch", "der", "cuisinier", "le"),
    "baker": ("Bäcker", "der", "boulanger", "le"),
    "king": ("König", "der", "roi", "le"),
    "queen": ("Königin", "die", "reine", "la"),
    "mother": ("Mutter", "die", "mère", "la"),
    "father": ("Vater", "der", "père", "le"),
}
THINGS = {
    "bag": ("Tasche", "die", "sac", "le"),
    "ball": ("Ball", "der", "ballon", "le"),
    "book": ("Buch", "das", "livre", "le"),
    "chair": ("Stuhl", "der", "chaise", "la"),
    "clock": ("Uhr", "die", "pendule", "la"),
    "coat": ("Mantel", "der", "manteau", "le"),
    "cup": ("Tasse", "die", "tasse", "la"),
    "hat": ("Hut", "der", "chapeau", "le"),
    "key": ("Schlüssel", "der", "clé", "la"),
    "lamp": ("Lampe", "die", "lampe", "la"),
    "shirt": ("Hemd", "das", "chemise", "la"),
    "table": ("Tisch", "der", "table", "la"),
}
QUALITIES = {  # before the noun in French; English: German stem, French masculine, French feminine
    "little": ("klein", "petit", "petite"),
    "young": ("jung", "jeune", "jeune"),
    "poor": ("arm", "pauvre", "pauvre"),
    "good": ("gut", "bon", "bonne"),
}
COLOURS = {  # after the noun in French
    "red": ("rot", "rouge", "rouge"),
    "blue": ("blau", "bleu", "bleue"),
    "green": ("grün", "vert", "verte"),
    "black": ("schwarz", "noir", "noire"),
    "white": ("weiß", "blanc", "blanche"),
    "yellow": ("gelb", "jaune", "jaune"),
}
VERBS = {  # English: German, French
    "buys": ("kauft", "achète"),
    "sells": ("verkauft", "vend"),
    "finds": ("findet", "trouve"),
    "sees": ("sieht", "voit"),
    "takes": ("nimmt", "prend"),
    "likes": ("mag", "aime"),
    "shows": ("zeigt", "montre"),
}

SLOTS = {  # of stories, contexts and dialogues
    "name": NAMES,
    "day": DAYS,
    "thing": tuple(THINGS),
    "colour": tuple(COLOURS),
    "food": ("soup", "salad", "pizza", "rice", "fish", "cake", "bread", "cheese"),
    "drink": ("tea", "coffee", "milk", "water", "juice", "wine"),
    "room": ("kitchen", "garden", "office", "cellar", "hall", "attic", "bedroom", "garage"),
    "offer": ("table", "room", "taxi", "boat"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight"),
}
CONTEXTS = (
    "{name} had {food} and {drink} on {day}. Then {she} took the {colour} {thing} from the {room} to the {goal}.",
    "On {day} {name} took the {colour} {thing} from the {room} to the {goal}. Then {she} had {food} and {drink}.",
)
QUESTIONS = {
    "Who took the {thing}?": "{name}",
    "What did {name} take?": "the {colour} {thing}",
    "What colour is the {thing}?": "{colour}",
    "Where was the {thing} before?": "the {room}",
    "Where is the {thing} now?": "the {goal}",
    "What did {name} eat?": "{food}",
    "What did {name} drink?": "{drink}",
    "Which day was it?": "{day}",
}
DIALOGUES = (  # two wordings of what the customer says, the reply
    (
        "I am {name} and I would like the {food} and the {drink}, please.",
        "Can I have the {food} and the {drink}? My name is {name}.",
        "Certainly, {name}. I will bring you the {food} and the {drink}.",
    ),
    (
        "My name is {name} and I want to book a {offer} for {number} on {day}.",
        "Hello, {name} here. Do you have a {offer} for {number} on {day}?",
        "Of course, {name}. Your {offer} for {number} on {day} is booked.",
    ),
    (
        "This is {name}. Please cancel the {offer} for {number} on {day}.",
        "I do not need the {offer} for {number} on {day} any more. My name is {name}.",
        "No problem, {name}. The {offer} on {day} is cancelled.",
    ),
    (
        "The {colour} {thing} that I bought on {day} is broken. My name is {name}.",
        "{name} here. My {colour} {thing} came on {day} and it is broken.",
        "I am sorry, {name}. We will send you a new {thing}.",
    ),
    (
        "Good morning, I am {name}. Do you have a {colour} {thing}?",
        "Hello, my name is {name} and I am looking for a {colour} {thing}.",
        "Welcome, {name}. Let me show you a {colour} {thing}.",
    ),
)

# Neither braces, "<", line breaks nor runs of spaces in the code: T5's own vocabulary has none of them.
FUNCTIONS = {  # name: what it returns, its code
    "total": ("the sum of", "sum(%s)"),
    "largest": ("the largest of", "max(%s)"),
    "smallest": ("the smallest of", "min(%s)"),
    "ordered": ("a sorted list of", "sorted(%s)"),
    "chosen": ("a list of", "[%s]"),
}
VALUES = {"": "x", "the squares of ": "x * x", "twice ": "2 * x", "half ": "x / 2"}
COLUMNS = ("prices", "ages", "scores", "weights", "heights", "marks", "sizes", "lengths", "points", "times")
CONDITIONS = {
    "greater than {}": "x > {}",
    "at least {}": "x >= {}",
    "equal to {}": "x == {}",
    "not equal to {}": "x != {}",
    "divisible by {}": "x % {} == 0",
}


class Example(NamedTuple):
    content: str  # decides the split
    fields: dict[str, str]  # for the prompt's wording
    completion: str


def records(split: str, seed: int = 0) -> list[dict[str, str | list[str]]]:
    """Return the records of a split, a pure function of the two arguments; the families alternate."""
    if split not in SIZES:
        raise UserError(f"builtin:instructions has no split {split!r}; its splits are {' and '.join(SIZES)}")
    columns = [_family_records(family, split, seed) for family in FAMILIES]
    return [dict(record) for row in zip(*columns, strict=True) for record in row]


@cache  # a run reads them for its tokenizer and for its examples
def _family_records(family: str, split: str, seed: int) -> tuple[dict[str, str | list[str]], ...]:
    rng = random.Random(f"wording {family} {split} {seed}")
    return tuple(
        {
            "id": f"{family}-{split}-{number}",
            "task": family,
            "prompt": rng.choice(PROMPTS[family]).format_map(example.fields),
            "completion": example.completion,
        }
        for number, example in enumerate(examples(family, split, seed))
    )


def examples(family: str, split: str, seed: int = 0) -> list[Example]:
    """Return a family's examples of a split, each content once."""
    rng = random.Random(f"content {family} {split} {seed}")
    found: dict[str, Example] = {}
    while len(found) < SIZES[split]:
        example = GENERATORS[family](rng)
        if _split_of(example.content) == split:
            found.setdefault(example.content, example)
    return list(found.values())


def _split_of(content: str) -> str:
    return "test" if hashlib.sha256(content.encode()).digest()[0] % 8 == 0 else "train"


def _slots(rng: random.Random) -> dict[str, str]:
    slots = {name: rng.choice(values) for name, values in SLOTS.items()}
    slots["she"], slots["her"] = PRONOUNS[slots["name"]]
    slots["Her"] = slots["her"].capitalize()
    return slots


def _summarisation(rng: random.Random) -> Example:
    slots = _slots(rng)
    slots["past"], slots["present"] = rng.choice(tuple(ACTIONS.items()))
    slots["place"], slots["where"] = rng.choice(tuple(PLACES.items()))
    headline = HEADLINE.format_map(slots)
    story = " ".join((rng.choice(OPENINGS), EVENT, rng.choice(ENDS))).format_map(slots)
    return Example(headline, {"story": story}, headline)


def _translation(rng: random.Random) -> Example:
    quality, person = rng.choice(tuple(QUALITIES)), rng.choice(tuple(PEOPLE))
    verb = rng.choice(tuple(VERBS))
    colour, thing = rng.choice(tuple(COLOURS)), rng.choice(tuple(THINGS))
    english = f"The {quality} {person} {verb} the {colour} {thing}."
    language, translate = rng.choice((("German", _german), ("French", _french)))
    return Example(english, {"language": language, "english": english}, translate(quality, person, verb, colour, thing))


def _german(quality: str, person: str, verb: str, colour: str, thing: str) -> str:
    subject, article, *_ = PEOPLE[person]
    object_, object_article, *_ = THINGS[thing]
    # The weak declension: -e in these nominatives and accusatives, but for the masculine accusative.
    accusative, ending = ("den", "en") if object_article == "der" else (object_article, "e")
    stem = COLOURS[colour][0]
    words = (article, QUALITIES[quality][0] + "e", subject, VERBS[verb][0], accusative, stem + ending, object_)
    return _sentence(words)


def _french(quality: str, person: str, verb: str, colour: str, thing: str) -> str:
    *_, subject, article = PEOPLE[person]
    *_, object_, object_article = THINGS[thing]
    adjective = QUALITIES[quality][1 if article == "le" else 2]
    object_colour = COLOURS[colour][1 if object_article == "le" else 2]
    return _sentence((article, adjective, subject, VERBS[verb][1], object_article, object_, object_colour))


def _sentence(words: tuple[str, ...]) -> str:
    text = " ".join(words)
    return text[0].upper() + text[1:] + "."


def _question_answering(rng: random.Random) -> Example:
    # One person and one of everything but rooms: with two people, a small T5 still guessed which of them a question
    # was about after 2,400 steps of 64 examples. The two rooms are the hardest thing that is asked.
    slots = _slots(rng)
    slots["room"], slots["goal"] = rng.sample(SLOTS["room"], 2)
    question, answer = rng.choice(tuple(QUESTIONS.items()))
    fields = {"context": rng.choice(CONTEXTS).format_map(slots), "question": question.format_map(slots)}
    return Example(CONTEXTS[0].format_map(slots), fields, answer.format_map(slots))


def _dialogue(rng: random.Random) -> Example:
    slots = _slots(rng)
    *turns, reply = rng.choice(DIALOGUES)
    return Example(turns[0].format_map(slots), {"turn": rng.choice(turns).format_map(slots)}, reply.format_map(slots))


def _code(rng: random.Random) -> Example:
    function, column = rng.choice(tuple(FUNCTIONS)), rng.choice(COLUMNS)
    value, condition = rng.choice(tuple(VALUES)), rng.choice(tuple(CONDITIONS))
    number = rng.randint(2, 9)
    what, call = FUNCTIONS[function]
    loop = f"{VALUES[value]} for x in {column} if {CONDITIONS[condition].format(number)}"
    signature = f"{function}({column})"
    result = f"{what} {value}the {column} that are {condition.format(number)}"
    return Example(result, {"signature": signature, "result": result}, f"def {signature}: return {call % loop}")


GENERATORS: dict[str, Callable[[random.Random], Example]] = {
    "summarisation": _summarisation,
    "translation": _translation,
    "question_answering": _question_answering,
    "dialogue": _dialogue,
    "code": _code,
}
