import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jax_it.data import builtin
from jax_it.data.builtin import FAMILIES, examples, records
from jax_it.errors import UserError

ROOT = Path(__file__).parents[2]
TRAIN, TEST = records("train"), records("test")
WORDINGS = {  # each wording as a pattern; the records hold rendered text alone
    family: [re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(text))) for text in texts]
    for family, texts in builtin.PROMPTS.items()
}


def of(family: str, rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["task"] == family]


def words(row: dict) -> list[str]:
    return re.findall(r"\w+|[^\w\s]+", f"{row['prompt']} {row['completion']}")


def test_the_splits_have_their_sizes_and_every_id_is_used_once():
    assert len(TRAIN) == 12_000 and len(TEST) == 500
    assert all(len(of(family, TEST)) == 100 for family in FAMILIES)
    assert all(set(row) == {"id", "task", "prompt", "completion"} for row in TRAIN + TEST)
    assert len({row["id"] for row in TRAIN + TEST}) == 12_500


def test_the_families_take_turns_so_that_a_limit_keeps_all():
    assert [row["task"] for row in TEST[:10]] == [*FAMILIES, *FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_content_of_the_test_split_is_in_training_whatever_its_wording(family):
    held_out = {example.content for example in examples(family, "test")}
    assert len(held_out) == 100
    for seed in (0, 1):
        assert held_out.isdisjoint(example.content for example in examples(family, "train", seed))


@pytest.mark.parametrize("family", ["summarisation", "translation", "code"])
def test_no_completion_of_the_test_split_is_in_training_where_it_tells_the_whole_content(family):
    assert {row["completion"] for row in of(family, TEST)}.isdisjoint(row["completion"] for row in of(family, TRAIN))


def test_no_prompt_occurs_twice():
    assert len({row["prompt"] for row in TRAIN + TEST}) == 12_500


def test_records_depend_on_split_and_seed_alone():
    assert records("test") == TEST and records("test", seed=1) != TEST
    code = "from jax_it.data.builtin import records; print(ascii(records('test')))"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        printed = subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True)
        assert ast.literal_eval(printed) == TEST


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_uses_all_its_wordings_in_both_splits(family):
    assert len(WORDINGS[family]) >= 3
    for rows in (TRAIN, TEST):
        prompts = [row["prompt"] for row in of(family, rows)]
        assert all(any(map(wording.fullmatch, prompts)) for wording in WORDINGS[family])


def test_every_word_of_the_test_split_occurs_in_training():
    assert {word for row in TEST for word in words(row)} <= {word for row in TRAIN for word in words(row)}


def test_prompts_and_completions_are_short_and_on_one_line():
    for row in TRAIN + TEST:
        assert 5 <= len(row["prompt"].split()) <= 45 and 1 <= len(row["completion"].split()) <= 16
        assert "\n" not in row["prompt"] + row["completion"] and "  " not in row["prompt"] + row["completion"]


def test_text_is_ascii_outside_the_translations_and_free_of_what_t5_has_no_pieces_for():
    for row in TRAIN + TEST:
        assert row["prompt"].isascii() and (row["task"] == "translation" or row["completion"].isascii())
        assert not set(r"{}<\^~`") & set(row["prompt"] + row["completion"])


def test_an_answer_is_contained_in_its_context():
    for example in (example for split in ("train", "test") for example in examples("question_answering", split)):
        assert re.search(rf"\b{re.escape(example.completion)}\b", example.fields["context"])


def test_every_question_is_asked_and_its_answer_depends_on_the_context():
    answers: dict[str, set[str]] = {}
    for example in examples("question_answering", "train"):
        answers.setdefault(example.fields["question"], set()).add(example.completion)
    assert {question.split()[0] for question in answers} == {"Who", "What", "Where", "Which"}
    assert all(len(found) > 1 for found in answers.values())


@pytest.mark.parametrize(
    ("words_", "german", "french"),
    [
        (("good", "woman", "takes", "black", "table"), "Die gute Frau nimmt den schwarzen Tisch.",
         "La bonne femme prend la table noire."),
        (("little", "girl", "buys", "white", "shirt"), "Das kleine Mädchen kauft das weiße Hemd.",
         "La petite fille achète la chemise blanche."),
        (("good", "doctor", "sees", "yellow", "clock"), "Der gute Arzt sieht die gelbe Uhr.",
         "Le bon médecin voit la pendule jaune."),
        (("poor", "king", "sells", "green", "coat"), "Der arme König verkauft den grünen Mantel.",
         "Le pauvre roi vend le manteau vert."),
    ],
)  # fmt: skip
def test_translations_agree_in_gender_and_case(words_, german, french):
    assert builtin._german(*words_) == german and builtin._french(*words_) == french


def test_french_nouns_start_with_consonants_so_that_no_article_is_elided():
    assert not [noun for *_, noun, _ in [*builtin.PEOPLE.values(), *builtin.THINGS.values()] if noun[0] in "aeéèiouyh"]


NUMBERS = [2, 3, 4, 5, 6, 7, 8, 9, 12, 3]
RETURNED = {
    "the sum": sum,
    "the largest": max,
    "the smallest": min,
    "a sorted list": sorted,
    "a list": list,
}
CHANGED = {"": lambda n: n, "the squares of ": lambda n: n**2, "twice ": lambda n: n + n, "half ": lambda n: n * 0.5}
KEPT = {
    "greater than": lambda n, k: n > k,
    "at least": lambda n, k: not n < k,
    "equal to": lambda n, k: n == k,
    "not equal to": lambda n, k: n < k or n > k,
    "divisible by": lambda n, k: divmod(n, k)[1] == 0,
}
INSTRUCTION = re.compile(
    f"({'|'.join(RETURNED)}) of ({'|'.join(CHANGED)})the ([a-z]+) that are ({'|'.join(KEPT)}) ([0-9])\\b"
)


def test_code_does_what_its_instruction_says():
    for row in of("code", TRAIN + TEST):
        what, change, column, keep, number = INSTRUCTION.search(row["prompt"]).groups()
        (definition,) = ast.parse(row["completion"]).body
        assert isinstance(definition, ast.FunctionDef) and f"{definition.name}({column})" in row["prompt"]
        scope: dict = {}
        exec(row["completion"], scope)
        expected = RETURNED[what](CHANGED[change](n) for n in NUMBERS if KEPT[keep](n, int(number)))
        assert scope[definition.name](NUMBERS) == expected, row


def test_an_unknown_split_is_an_error_that_names_the_two():
    with pytest.raises(UserError, match=r"no split 'validation'; its splits are train and test"):
        records("validation")
