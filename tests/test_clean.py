"""What a cell cannot say of cleaning, of duplicates and of contamination: whole corpora, other
processes, any text at all."""
import os
import random
import re
import subprocess
import sys
import sysconfig
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bantam.core import BantamError, digest
from bantam.data import dedup
from bantam.data.clean import CONTROL, REASONS, WEB, Cleaner, CleanSettings
from bantam.data.contamination import Forbidden
from bantam.data.dedup import Deduplicator, signature

SCRIPTS = dict( # a sentence each, in composed form
    latin="Zwölf Boxkämpfer jagen Viktor; façade, naïve, Łódź, Ağrı.",
    greek="Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    cyrillic="Съешь же ещё этих мягких французских булок.",
    arabic="نص عربي مع تشكيل: مَرحَبًا.", persian="می‌خواهم کتاب‌ها را بخوانم.",
    hebrew="עברית עם ניקוד: שָׁלוֹם.", hindi="नमस्ते दुनिया, क्या हाल है?",
    bengali="আমি বাংলায় গান গাই।",
    tamil="வணக்கம் உலகம்.", thai="สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง", chinese="天地玄黄,宇宙洪荒。　全角空格",
    japanese="いろはにほへと ｶﾞｷﾞ ①②", korean="다람쥐 헌 쳇바퀴에 타고파.",
    amharic="ሰላም ለዓለም፡ አማርኛ።", georgian="ქართული ენა.", armenian="Հայերեն լեզու։",
    emoji="👩‍👩‍👧 🏳️‍🌈 👍🏽 ❤️", symbols="∀x∈ℝ: ⌈x⌉ ≤ x² ½ ℌ ﬁ Ａ … ™ →")


def seen(text):
    "The characters that a reader sees, in order."
    return re.sub(r"\s", "", CONTROL.sub("", text))


# --- the cleaner changes nothing that is seen -----------------------------------------------------

def sources():
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if "site-packages" in file.parts: continue
        try: yield file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")
        # of other encodings on purpose
        except UnicodeDecodeError: assert {"test", "tests"} & set(file.parts)


def test_source_code_stays_as_it_is():
    """Every module of the standard library: indentation, symbols, case, and nearly always every
    byte."""
    clean, plain, same, n, composed = Cleaner(), Cleaner(CleanSettings(unicode="none")), 0, 0, []
    for name, source in sources():
        if not source.strip(): continue
        n += 1
        made = plain(source)[0]
        lines = [line.rstrip(" \t") for line in CONTROL.sub("", source).split("\n")]
        assert [line for line in made.split("\n") if line] == [line for line in lines if line], name
        same += made == source
        if clean(source)[0] != made:
            composed.append(name)
            assert clean(source)[0] == unicodedata.normalize("NFC", made)
    assert n > 500 and same > .9*n
    # tables and tests of such characters alone
    assert len(composed) < 8 and all("test" in n or n == "re/_casefix.py" for n in composed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_stays_as_it_is(script):
    text, clean = SCRIPTS[script], Cleaner()
    assert unicodedata.normalize("NFC", text) == text
    for dress in (text, f"\t{text}  {text}", f"{text}\n\n    {text}\n",
                  f"if x['{text}'] != 0:\n\treturn \"{text}\"  # {text}\n"):
        assert clean(dress) == (dress, None)
    assert clean(f"\r\n{text} \t\r\n\r\n\r\n\r\n\r\n{text}\r\n\r\n") == (
        f"{text}\n\n\n{text}\n", None)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text(text):
    "Nothing visible is lost, twice is like once, and no text breaks it."
    made, why = Cleaner(CleanSettings(min_chars=0))(text)
    assert why is None and seen(made) == seen(unicodedata.normalize("NFC", text))
    assert Cleaner(CleanSettings(min_chars=0))(made) == (made, None)
    assert Cleaner(CleanSettings(**WEB))(text)[1] in (None, *REASONS)


@settings(max_examples=200, deadline=None)
@given(st.text("a \t\n\r\x00\x0c\u00a0", max_size=40), st.integers(0, 4))
def test_white_space_by_its_rules(text, most):
    made = Cleaner(CleanSettings(min_chars=0, max_blank_lines=most))(text)[0]
    assert (not re.search(r"\r|\x00|[ \t]$|[ \t]\n|^\n", made) and "\n" * (most + 2) not in made
            and not made.endswith("\n\n"))
    assert [line for line in made.split("\n") if line] == [line for l in re.split(
        r"\r\n|\r|\n", text.replace("\x00", "")) if (line := l.rstrip(" \t"))]


def test_cleaner_in_other_processes():
    texts = [t for _, t in zip(range(40), (s for _, s in sources()))] + [
        "", "hen " * 999, "caf\ufffd" * 99]
    clean = Cleaner(
        CleanSettings(**WEB), forbidden=Forbidden(["one two three four five six seven eight nine"]))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        assert list(pool.map(clean, texts)) == list(map(clean, texts))


@pytest.mark.parametrize("how", [dict(min_letters=.5), dict(max_repeated=.1), dict(max_packing=2.),
                                 dict(max_broken=0.), dict(max_chars=20), dict(max_line_chars=20),
                                 dict(min_chars=9000)])
def test_every_filter_drops_something(how):
    texts = ["1 2 3 4 5 6 7 8", "the same line of words\n" * 40, "caf\ufffd au lait",
             "A hen sat on the wall and looked at the moon. " * 2, "short"]
    assert (any(Cleaner(CleanSettings(**how))(t)[1] for t in texts)
            and not any(Cleaner()(t)[1] for t in texts))


# --- duplicates -----------------------------------------------------------------------------------

WORDS = [f"{a}{b}{c}" for a in ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti")
         for b in ("n", "r", "st", "ll", "nd") for c in ("a", "er", "ing", "o", "y")]


def tale(rng, n):
    return " ".join(WORDS[min(int(rng.paretovariate(.8)) - 1, len(WORDS) - 1)] if rng.random() < .4
                    else rng.choice(WORDS) for _ in range(n))


def disturbed(rng, text):
    """A copy as the web makes them: another case, other white space, a few words changed, dropped
    or doubled."""
    w = text.split()
    for i in rng.sample(range(len(w)), max(1, len(w)//60)):
        w[i] = rng.choice((rng.choice(WORDS), "", f"{w[i]} {w[i]}"))
    return rng.choice((str, str.upper, str.title))(rng.choice((" ", "\n", " - ")).join(w))


@pytest.mark.parametrize("seed", range(2))
def test_planted_copies_are_found(seed, monkeypatch):
    """Three in a hundred, recall over 95 %, precision over 99 %, and hardly anything else is looked
    at."""
    rng = random.Random(seed)
    texts = {i: tale(rng, rng.randint(80, 200)) for i in range(5000)}
    copies = {f"copy of {i}, {k}": i for k, i in enumerate(rng.choices(range(5000), k=150))}
    stream = [*texts.items(), *((k, disturbed(rng, texts[i])) for k, i in copies.items())]
    rng.shuffle(stream)
    compared, real = [0], dedup.likeness
    def counting(a, b): compared[0] += len(b); return real(a, b)
    monkeypatch.setattr(dedup, "likeness", counting)
    find = Deduplicator()
    found = {k: first for k, text in stream if (
        first := find.seen(k, find.signature(text))) is not None}
    group = lambda k: copies.get(k, k)
    right = sum(group(k) == group(first) for k, first in found.items())
    assert right > .95*len(copies) and right > .99*len(found)
    assert compared[0] == find.candidates < len(stream) # of 13 million pairs


def test_exact_copies_only():
    rng = random.Random(5)
    text = tale(rng, 100)
    find = Deduplicator(threshold=1.)
    assert [find.seen(i, find.signature(t)) for i, t in enumerate(
        (text, disturbed(rng, text), text + "\n", "  " + text))] == [None, None, 0, 0]


def test_chain_of_small_changes_does_not_drop_everything():
    """Each text is like the one before, the last is nothing like the first: more than one has to
    stay."""
    rng = random.Random(7)
    words, find, kept = tale(rng, 100).split(), Deduplicator(), 0
    for step in range(60):
        kept += find.seen(step, find.signature(" ".join(words))) is None
        for i in rng.sample(range(100), 2): words[i] = f"new{step}x{i}"
    assert 3 < kept < 40


def test_signature_is_the_same_everywhere():
    program = ("from bantam.core import digest\nfrom bantam.data.dedup import signature\n"
               "s = signature('The hen and the goose went over the "
               "wall.')\nprint(digest([s.exact.hex(), s.mins_P.tolist()]))")
    made = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                           check=True, env={**os.environ, "PYTHONHASHSEED": h}).stdout.strip()
            for h in ("1", "2")}
    s = signature("The hen and the goose went over the wall.")
    assert made == {digest([s.exact.hex(), s.mins_P.tolist()])}


@settings(max_examples=200, deadline=None)
@given(st.text(), st.sampled_from([1, 3, 5]))
def test_any_text_has_a_signature(text, ngram):
    a, b = signature(text, ngram), signature(f" {text}\n", ngram)
    assert (a.exact == b.exact and (a.mins_P is None) == (b.mins_P is None)
            and (a.mins_P is None or np.array_equal(a.mins_P, b.mins_P)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_words(script):
    "In scripts with spaces and in those without, a small change at the end leaves texts alike."
    s = SCRIPTS[script]
    long = " ".join(f"{s} {i}" for i in range(30))
    if script == "emoji": return
    assert (0 < dedup.likeness(signature(long).mins_P, signature(long + " 77").mins_P)
            and len(dedup.word_hashes(s)) >= 2)


# --- contamination --------------------------------------------------------------------------------

def test_copied_questions_are_found_in_long_documents():
    rng = random.Random(3)
    held, pages = [tale(rng, 30) for _ in range(200)], [tale(rng, 2000) for _ in range(100)]
    check = Forbidden(held)
    assert not any(map(check, pages))
    for page, question in zip(pages, held):
        words = page.split()
        def inserted(some): return " ".join([*words[:700], "before", *some, "behind", *words[700:]])
        assert (check.hits(inserted(question.upper().split()[5:18])) == 1
                and not check(inserted(question.split()[5:17])))


def test_short_questions_are_counted_not_forgotten():
    check = Forbidden(["What is it?", "Which of the four small hens laid the egg?"])
    assert check.too_short == 1 and "1 texts are too short" in repr(check)
    with pytest.raises(BantamError, match="none of 2 evaluation texts has 8 words"):
        Forbidden(["What is it?", ""])
