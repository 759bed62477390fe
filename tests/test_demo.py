"""The embedded default: its stories keep their word, and its files are what the script makes."""

import json
import re
import sys
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import data
import distill
import eval
import losses
import models
import optim
import student

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))  # where `python demo/make.py` finds its neighbour

import make  # noqa: E402
from stories import story  # noqa: E402

STORIES = [story(seed) for seed in range(5_000_000, 5_002_000)]
TOKENIZER = Tokenizer.from_file(str(DEMO / "teacher" / "tokenizer.json"))
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()


def matches(pattern: str) -> list[tuple[str, ...]]:
    """What the groups of `pattern` hold, in each of many stories that has it."""
    groups = [match.groups() for tale in STORIES if (match := re.search(pattern, tale))]
    assert len(groups) > 50
    return groups


def test_stories_are_clean_paragraphs():
    assert len(set(STORIES)) == len(STORIES)
    for tale in STORIES:
        assert 120 <= len(tale.split()) <= 240
        assert not re.search(r"[^A-Za-z,.?!:'\" -]|  | [,.?!]", tale), tale
        assert tale.count('"') % 2 == 0, tale
        assert all(s[0].isupper() for s in re.split(r'[.!?] "?|\." "?', tale)), tale


def test_articles_agree():
    silent = {"honest"}
    for tale in STORIES:
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", tale):
            assert (word[0] in "aeiou" or word in silent) == (article.lower() == "an"), tale


def test_pronouns_agree_where_all_are_of_one_gender():
    genders = []
    for tale in STORIES:
        names = re.findall(r"\b[A-Z]\w+(?:la|na|ra|lia|nda|bo|rin|ko|mus|ric)\b", tale)
        female = {name.endswith("a") for name in names}
        if len(female) == 1:
            genders += female
            wrong = "he|him|his" if female == {True} else "she|her"
            assert not re.search(rf"\b({wrong})\b", tale, re.IGNORECASE), tale
    assert min(genders.count(True), genders.count(False)) > 50


def test_what_is_given_away_is_gone():
    pattern = (
        r"(?:gathered|found) (\w+) .*(?:Take|Have) (\w+) .* had (\w+) \w+ left\. .* gave (?:him|"
        r"her) (\w+) .* (?:was|were) only (\w+) .* remembered the (\w+) .* remembered the (\w+)"
    )
    for words in matches(pattern):
        n, a, rest, b, left, first, second = (NUMBERS.index(word) + 1 for word in words)
        assert (rest, left, first, second) == (n - a, n - a - b, a, b)


def test_swapped_things_change_hands():
    pattern = (
        r"(\w+) had an? (\w+ \w+), but .* met (\w+) the \w+, who had an? (\w+ \w+)\. .* look\w* for"
        r" an? (\w+ \w+)\. .* (?:found|met) (\w+) the .*In the end (.*), and all three"
    )
    for hero, first, owner, wanted, asked, other, end in matches(pattern):
        owners = dict(re.findall(r"(\w+) had the (\w+ \w+)", end))
        assert owners == {hero: wanted, owner: asked, other: first}


def test_what_was_forgotten_was_asked_for_and_not_brought():
    pattern = (
        r"bring me .* of (\w+), .* of (\w+) and .* of (\w+),\" .*Here is .* of (\w+), and here is"
        r" .* of (\w+),\" .*what about the (\w+)\?"
    )
    for *asked, brought, too, forgotten in matches(pattern):
        assert sorted(asked) == sorted((brought, too, forgotten))


def test_the_trace_leads_to_who_could_leave_it():
    able = {
        "feather": "sparrow owl crow robin",
        "scratches": "squirrel cat raccoon lizard",
        "footprints": "otter frog duck beaver",
        "earth": "mole rabbit badger armadillo",
        "door": "bear ox donkey boar",
    }
    pattern = (
        r"and (?:the heavy|there was a|there were)(?: wet| heap of fresh)? (\w+) .* the day before:"
        r" (.*) must have been (\w+)\."
    )
    for trace, neighbours, thief in matches(pattern):
        kinds = dict(re.findall(r"(\w+) the (\w+)", neighbours))
        could = [name for name, kind in kinds.items() if kind in able[trace].split()]
        assert could == [thief]


def test_text_is_what_the_script_makes(tmp_path):
    make.text(tmp_path)
    content = (tmp_path / "stories.txt").read_bytes()
    assert content == (DEMO / "stories.txt").read_bytes()
    assert content.decode().strip().split("\n\n")[7] == story(7)


def test_tokenizer_is_what_the_script_makes(tmp_path):
    make.tokenizer(tmp_path)
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (DEMO / "teacher" / name).read_bytes()
    new, old = (
        json.loads((folder / "tokenizer.json").read_text())["model"]
        for folder in (tmp_path, DEMO / "teacher")
    )
    assert new == old


def test_settings_name_the_end_of_a_story():
    config = json.loads((DEMO / "teacher" / "tokenizer_config.json").read_text())
    generation = json.loads((DEMO / "teacher" / "generation_config.json").read_text())
    assert TOKENIZER.get_vocab_size() == make.VOCABULARY
    assert TOKENIZER.token_to_id(config["eos_token"]) == generation["eos_token_id"]
    assert TOKENIZER.encode(story(1)).ids[0] != generation["eos_token_id"]
    assert max(len(TOKENIZER.encode(tale).ids) for tale in STORIES) < config["model_max_length"]


@given(st.text())
@example("naïve 🦊\r\n\t\x00 日本語<|endoftext|>")
def test_every_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_a_few_steps_of_distillation_bring_a_cut_near_its_teacher(tmp_path):
    source = data.Config((str(DEMO / "stories.txt"),), documents="paragraph", cache=str(tmp_path))
    corpus = data.open_corpus(source, DEMO / "teacher", seq_len=64, seed=0, vocab=make.VOCABULARY)
    held_out = [next(data.evaluation(corpus, 32))]
    teacher = models.load(DEMO / "teacher", dtype="float32")
    cut = student.cut(teacher, {"layers": (0, 4, 5, 7)})
    before = eval.evaluate(cut, teacher, held_out)["kl"]
    optimizer = optim.make(optim.Config(lr=5e-4), steps=40)
    state = distill.init_state(cut, optimizer)
    for step in range(40):
        batch = data.batch(corpus, step, 8)
        state, _ = distill.step((teacher, batch), state, optimizer, losses.Objective())
    after = eval.evaluate(state.student, teacher, held_out)["kl"]
    assert after < before / 3
