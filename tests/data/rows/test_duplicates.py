"""Near duplicates: planted paraphrases among unrelated rows, by hand-computed similarities, in several languages."""

import random

import pytest

from utils.data.rows import duplicates
from utils.data.rows.duplicates import find_duplicates, similarity
from utils.errors import InputError

LETTERS = {
    "latin": "abcdefghijklmnopqrstuvwxyz",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщыэюя",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "han": "".join(map(chr, range(0x4E00, 0x4E00 + 1200))),
}


def words_of(script: str, generator: random.Random, count: int = 600) -> list[str]:
    lengths = (1, 2) if script == "han" else range(3, 10)
    return ["".join(generator.choices(LETTERS[script], k=generator.choice(lengths))) for _ in range(count)]


def text_of(words: list[str], generator: random.Random, script: str) -> str:
    between = "" if script == "han" else " "
    return between.join(generator.choices(words, k=generator.randint(15, 60)))


def edited(text: str, words: list[str], generator: random.Random, script: str) -> str:
    """About one place in twenty changed: a word replaced, left out or put in, or a letter mistyped."""
    pieces = list(text) if script == "han" else text.split()
    for index in generator.sample(range(len(pieces)), max(1, len(pieces) // 20)):
        kind = generator.randrange(4)
        if kind == 0:
            pieces[index] = generator.choice(words)
        elif kind == 1:
            pieces[index] = ""
        elif kind == 2:
            pieces[index] += ("" if script == "han" else " ") + generator.choice(words)
        else:
            place = generator.randrange(len(pieces[index]))
            letter = generator.choice(LETTERS[script])
            pieces[index] = pieces[index][:place] + letter + pieces[index][place + 1 :]
    return ("" if script == "han" else " ").join(pieces)


def planted(script: str, count: int = 400, copies: int = 150):
    """Unrelated rows of a prompt and an answer, then edited copies of the first of them in mixed order."""
    generator = random.Random(script)
    words = words_of(script, generator)
    rows = [tuple(text_of(words, generator, script) for _ in range(2)) for _ in range(count)]
    originals = generator.sample(range(count), copies)
    rows += [tuple(edited(text, words, generator, script) for text in rows[index]) for index in originals]
    return rows, dict(enumerate(originals, count))


def found_in(rows, *, near=True, protected=0) -> dict[int, int]:
    repeats = find_duplicates(lambda numbers: [rows[n] for n in numbers], len(rows), near=near, protected=protected)
    return {number: int(original) for number, original in enumerate(repeats) if original >= 0}


@pytest.mark.parametrize("script", LETTERS)
def test_planted_paraphrases_are_found_and_nothing_else(script):
    pytest.importorskip("rensa", reason="MinHash is optional: pip install rensa")
    rows, truth = planted(script)
    found = found_in(rows)
    right = sum(truth.get(number) == original for number, original in found.items())
    assert right / len(found) >= 0.98 and right / len(truth) >= 0.95
    assert found_in(rows) == found


def test_exact_finds_equal_rows_and_no_others():
    rows = [("a", "b"), ("ab", ""), ("a", "b"), ("A", "b"), ("a", "b "), ("", "ab"), ("ab", "")]
    assert found_in(rows, near=False) == {2: 0, 6: 1}


def test_protected_rows_stay_and_remove_others():
    pytest.importorskip("rensa", reason="MinHash is optional: pip install rensa")
    text = "the quick brown fox jumps over the lazy dog and runs away into the forest"
    rows = [(text, "yes it does"), (text, "yes it does"), (text.replace("lazy", "tired"), "yes it does")]
    assert found_in(rows, protected=2) == {2: 0}
    assert found_in(rows, near=False, protected=1) == {1: 0}
    assert found_in(rows) == {1: 0, 2: 0}


def test_similarity_by_hand():
    # abcdef has the shingles abcd, bcde, cdef; bcdefg shares two of the four: the end of the prompt is all of it.
    assert similarity(("abcdef", "x"), ("bcdefg", "x")) == pytest.approx((2 + 1) / (4 + 1))
    assert similarity(("ABC  def", ""), ("abc DEF", "")) == 1  # case and white space
    assert similarity(("ａｂｃ１", ""), ("abc1", "")) == 1  # full width


ANSWER = "Take the second road on the left, and then walk straight on to the old bridge."


def test_every_part_must_be_alike():
    long = "Tell me, as well as you can and in a few short words, how one gets from the station to the old bridge. " * 9
    assert similarity((long, ANSWER), (long, "I do not know.")) == 0
    assert similarity((long, ANSWER), (long, ANSWER.replace("second", "first"))) > 0.9
    # The prompts of two turns of one dialogue, of which all but the last question is the same.
    assert (
        similarity((long,), (long + "And where is the market? When does it open, and what can one buy there? " * 3,))
        == 0
    )
    # One pair the other way round.
    assert similarity((long, ANSWER, "No."), (long, "No.", ANSWER)) == 0


@pytest.mark.parametrize("text", ["What is {} times seven, written as a word?", "七乘以{}等于多少请用汉字写出来"])
def test_rows_that_differ_in_a_number_are_different(text):
    assert similarity((text.format(12), ANSWER), (text.format(13), ANSWER)) == 0
    assert similarity((text.format(12), ANSWER), (text.format(12) + "!", ANSWER)) > 0.8
    assert similarity(("the word" + "x12 is in this text", ANSWER), ("the wordx13 is in this text", ANSWER)) > 0.7


def test_the_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(InputError, match=r"^--deduplicate near needs the library rensa \(pip install rensa==.*exact$"):
        duplicates.minhash_library()
