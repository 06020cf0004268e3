"""Texts without spaces between words are cut into what can be counted."""

import unicodedata

import pytest

from jax_it import metrics
from jax_it.metrics import languages
from jax_it.metrics.languages import spaced


def test_characters_are_single_in_scripts_without_spaces_and_words_in_the_rest():
    assert metrics.characters("我喜欢Python 3, 你呢？") == [*"我喜欢", "python", "3", *"你呢"]
    assert metrics.characters("１２００元，ＡＢＣ。") == ["1200", "元", "abc"]  # full width
    assert metrics.characters("カタカナﾃｽﾄとかな、ー") == [*"カタカナテストとかなー"]
    assert metrics.characters("한국어를 배워요") == [*"한국어를배워요"]
    assert metrics.characters("ที่นี่") == ["ที่", "นี่"]  # marks stay on their letter
    assert metrics.characters("हिन्दी में Ünïcode") == ["हिन्दी", "में", "ünïcode"]
    assert metrics.characters("日本Tokyo東京2020年") == ["日", "本", "tokyo", "東", "京", "2020", "年"]
    assert metrics.characters("don't snake_case ½") == ["don", "t", "snake", "case", "1", "2"]
    assert metrics.characters(" \n…！\u0301") == []


def test_spaces_are_put_around_characters_of_scripts_without_them_and_nothing_is_lost():
    assert spaced("猫坐。").split() == ["猫", "坐", "。"]
    assert spaced("我喜欢Python3,你").split() == ["我", "喜", "欢", "Python3,", "你"]
    assert spaced("ที่นี่ ok").split() == ["ที่", "นี่", "ok"]
    assert spaced("한국어를 Ünïcode").split() == [*"한국어를", "Ünïcode"]
    assert spaced("ﾃｽﾄ １２").split() == ["テ", "ス", "ト", "12"]
    assert spaced("plain words, unchanged.\n") == "plain words, unchanged.\n"


# A prediction, and a reference that says nearly the same.
LANGUAGES = {
    "Chinese": ("他昨天去了北京。", "他昨天到了北京。"),
    "Japanese": ("東京タワーはとても高いです。", "東京タワーは高いです。"),
    "Korean": ("나는학교에서공부했다.", "나는학교에공부하러갔다."),
    "Thai": ("เขาไปโรงเรียนเมื่อวาน", "เขาไปโรงเรียนวันนี้"),
    "Lao": ("ຂ້ອຍໄປໂຮງຮຽນມື້ວານ", "ຂ້ອຍໄປໂຮງຮຽນມື້ນີ້"),
    "Khmer": ("ខ្ញុំទៅសាលារៀនម្សិលមិញ", "ខ្ញុំទៅសាលារៀនថ្ងៃនេះ"),
    "Burmese": ("မနေ့ကကျောင်းသွားတယ်", "ဒီနေ့ကျောင်းသွားတယ်"),
}
FOR_THEM = ("rouge1_chars", "rouge2_chars", "rougeL_chars", "bleu_char", "chrf", "squad_f1_chars")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_without_spaces_is_scored_by_what_it_shares(language):
    prediction, reference = LANGUAGES[language]
    for name, value in metrics.score(FOR_THEM, [prediction], [[reference]]).items():
        assert 10 < value < 95, name
    assert metrics.score(FOR_THEM, [reference], [[reference]]) == pytest.approx(dict.fromkeys(FOR_THEM, 100))
    assert metrics.score(FOR_THEM, ["Ω"], [[reference]]) == dict.fromkeys(FOR_THEM, 0)
    assert 5 < metrics.score(["ter_chars"], [prediction], [[reference]])["ter_chars"] < 95
    # What counts words sees one word, and a wrong one.
    assert metrics.score(["rougeL", "squad_f1"], [prediction], [[reference]]) == {"rougeL": 0, "squad_f1": 0}


def test_metrics_that_cannot_count_the_references_are_named_with_what_can():
    names = ["rouge1", "rougeL", "bleu", "chrf", "ter", "squad_f1", "exact_match", "rougeL_chars"]
    chinese = metrics.advice(names, [["他昨天去了北京 in 2020"], ["是"]])
    assert "rouge1, rougeL cannot count; use rouge1_chars, rougeL_chars" in chinese
    assert "bleu, ter, squad_f1 cannot count; use bleu_zh, bleu_ja or bleu_char, ter_chars, squad_f1_chars" in chinese
    assert "chrf" not in chinese and "exact_match" not in chinese and "\n" not in chinese
    russian = metrics.advice(names, [["Вчера он был в Москве."]])  # has spaces, but none of ROUGE's letters
    assert "rouge1, rougeL cannot" in russian and "bleu" not in russian
    korean = metrics.advice(names, [["그는 어제 서울에 갔다."]])
    assert "rougeL" in korean and "bleu" not in korean
    assert metrics.advice(names, [["He went to 北京 yesterday."], ["Müller"]]) == ""
    assert metrics.advice(names, [[""], ["12"]]) == ""
    assert metrics.advice(["chrf", "rougeL_chars", "mine.py:f"], [["他昨天去了北京"]]) == ""


def test_two_patterns_find_the_same_words_as_unicode_data_character_by_character():
    def one_by_one(text):
        tokens, before = [], ""
        for character in unicodedata.normalize("NFKC", text).lower():
            kind = unicodedata.category(character)[0]
            alone = kind != "M" and bool(languages._ALONE.match(character))
            if kind in before and not alone:
                tokens[-1] += character
            elif kind in "LN":
                tokens.append(character)
                before = "M" if alone else "LNM"
            else:
                before = ""
        return tokens

    known = [chr(code) for code in range(0x20000) if unicodedata.category(chr(code))[0] in "LMNPSZ"]
    for start in range(0, len(known), 500):
        text = "".join(f"a{character}\u0301b 一{character}c" for character in known[start : start + 500])
        assert languages.characters(text) == one_by_one(text)
    plain = "a" + "a".join(filter(languages._PLAIN.fullmatch, known))
    assert languages.characters(plain) == one_by_one(plain)
