"""The store, the windows over it and the order they come in."""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import gc
import itertools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import data
from runtime import files, report
from runtime.errors import UserError
from text import files as text_files
from text import records, store

WORDS = [f"w{i}" for i in range(200)]
EOS = len(WORDS)
# A busy machine is slow, which says nothing of the code.
unhurried = settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer that knows whole words: `w7` is token 7."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {word: i for i, word in enumerate([*WORDS, "<eos>"])}
    encoder = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    encoder.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return folder


def corpus_of(folder, lengths, seq_len, *, seed=0, trained=None) -> data.Corpus:
    """A corpus of documents of these lengths, in which every token is its own position."""
    position, folder = 0, folder / uuid.uuid4().hex
    with store.TokenFiles(folder, "uint32") as stream:
        for i, length in enumerate(lengths):
            ids = list(range(position, position + length))
            stream.add(ids, trained[i] if trained else [], True)
            position += length
    store.write_sums(folder)
    facts = (position, position, len(lengths), trained is not None, "")
    tokens = data.Store(folder, "uint32", *facts)
    return data.Corpus(((data.TokenRange(tokens, 0, position, seq_len),),), (), (), seq_len, seed)


def targets(batch: data.Batch) -> list[list[int]]:
    """The tokens whose prediction counts, row by row."""
    rows = zip(batch.tokens[:, 1:], batch.mask, strict=True)
    return [tokens[mask].tolist() for tokens, mask in rows]


lengths = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 60)), min_size=1, max_size=12)


@unhurried
@given(lengths.filter(lambda x: sum(x) > 1), st.integers(1, 9), st.integers(1, 5), st.integers())
def test_every_token_but_a_first_is_predicted_once_an_epoch(
    tmp_path, lengths, seq_len, batch_size, seed
):
    corpus = corpus_of(tmp_path, lengths, seq_len, seed=seed)
    firsts = {0, *itertools.accumulate(lengths)}
    expected = sorted(set(range(sum(lengths))) - firsts)
    windows = corpus.windows
    if batch_size > windows:
        with pytest.raises(UserError, match="too little text"):
            data.batch(corpus, 0, batch_size)
        return
    rows = []  # as many steps as there are windows make a whole number of epochs
    for step in range(windows):
        rows += targets(data.batch(corpus, step, batch_size))
    for epoch in range(batch_size):
        seen = rows[epoch * windows : (epoch + 1) * windows]
        assert sorted(itertools.chain(*seen)) == expected


@unhurried
@given(lengths.filter(lambda x: sum(x) > 1), st.integers(1, 9))
def test_segments_are_the_documents_of_a_row(tmp_path, lengths, seq_len):
    corpus = corpus_of(tmp_path, lengths, seq_len)
    document = np.repeat(np.arange(len(lengths)), lengths)
    for step in range(corpus.windows):
        tokens, segments, mask = (x[0] for x in data.batch(corpus, step, 1)[:3])
        real = segments > 0
        assert not real[np.argmin(real) :].any() or real.all()
        assert not mask[~real[1:]].any() and not tokens[~real].any()
        assert (np.diff(tokens[real]) == 1).all()
        numbers = document[tokens[real]]
        assert segments[real].tolist() == (np.unique(numbers, return_inverse=True)[1] + 1).tolist()
        assert mask[: real.sum() - 1].tolist() == (numbers[1:] == numbers[:-1]).tolist()


def test_trained_runs_become_the_mask(tmp_path):
    # Runs that touch across documents, and one that spans several windows.
    trained = [[1, 4], [0, 2, 3, 17], [], [0, 1]]
    lengths = [4, 18, 3, 6]
    corpus = corpus_of(tmp_path, lengths, 5, trained=trained)
    rows = [targets(data.batch(corpus, step, 1))[0] for step in range(corpus.windows)]
    assert sorted(itertools.chain(*rows)) == [1, 2, 3, 5, *range(7, 21)]


def test_order_differs_between_epochs_and_seeds_and_resumes(tmp_path):
    lengths = [37] * 20
    corpus = corpus_of(tmp_path, lengths, 8)
    again, other = (corpus_of(tmp_path, lengths, 8, seed=seed) for seed in (0, 1))

    def starts(corpus, epoch):
        steps = range(epoch * corpus.windows, (epoch + 1) * corpus.windows)
        return [int(data.batch(corpus, step, 1).tokens[0, 0]) for step in steps]

    first, second = starts(corpus, 0), starts(corpus, 1)
    assert first != second and first != starts(other, 0) and first != sorted(first)
    assert sorted(first) == sorted(second)
    assert starts(again, 1) == second  # the second epoch alone: nothing came before


def test_any_step_reads_its_own_rows_alone(tmp_path, monkeypatch):
    corpus = corpus_of(tmp_path, [50] * 400, 8)
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args) or pread(*args))
    data.batch(corpus, 10**9, 8, process_index=1, process_count=4)
    assert len(reads) == 2 * 2 and all(size <= 2 * data.BLOCK for _, size, _ in reads)


@unhurried
@given(st.integers(0, 10**6), st.sampled_from([(), (1.0, 3.0)]))
def test_processes_together_have_the_same_batch(tmp_path, step, weights):
    one, two = (corpus_of(tmp_path, [23] * 9, 8) for _ in range(2))
    corpus = dataclasses.replace(one, groups=one.groups + two.groups, weights=weights)
    whole = data.batch(corpus, step, 8)[:3]
    for count in (2, 4):
        parts = [data.batch(corpus, step, 8, i, count)[:3] for i in range(count)]
        for joined, array in zip(map(np.concatenate, zip(*parts, strict=True)), whole, strict=True):
            np.testing.assert_array_equal(joined, array)
    with pytest.raises(UserError, match="does not divide over 3"):
        data.batch(corpus, step, 8, 0, 3)


@unhurried
@given(st.integers(1, 3000), st.text())
def test_permutations_permute(size, key):
    assert sorted(data.permute(np.arange(size), size, key)) == list(range(size))


def test_permutations_of_trillions_and_of_five():
    size = 3 * 10**12
    there = data.permute(np.arange(0, size, size // 5000), size, "key")
    assert len(set(there.tolist())) == len(there) and 0 <= there.min() < there.max() < size
    assert abs(np.corrcoef(np.arange(len(there)), there)[0, 1]) < 0.07
    # Over keys each of the 120 orders of five is as likely: chi squared has mean 119, deviation 15.
    orders = collections.Counter(
        tuple(data.permute(np.arange(5), 5, f"{key}").tolist()) for key in range(2400)
    )
    assert len(orders) == 120 and sum((n - 20) ** 2 / 20 for n in orders.values()) < 200


@unhurried
@given(st.integers(0, 10**9), st.lists(st.floats(0.01, 10), min_size=1, max_size=4), st.integers())
def test_mixtures_are_dealt_in_exact_shares(first, weights, seed):
    rows = np.arange(first, first + 400)
    source, before = data.assign_sources(rows, weights, seed)
    for i, weight in enumerate(weights):
        # Places within a source follow each other, and count the rows it had, from the first on.
        places = before[source == i]
        assert (np.diff(places) == 1).all()
        share = weight / sum(weights)
        bound = len(weights) + first * 2**-22  # of rounded weights
        assert all(abs(places - rows[source == i] * share) <= bound)
    if first == 0:
        assert [before[source == i].tolist()[:1] in ([0], []) for i in range(len(weights))]


def test_a_mixture_repeats_the_small_source(tmp_path):
    small, large = (corpus_of(tmp_path, [n], 4) for n in (41, 401))
    groups = small.groups + large.groups
    mixture = dataclasses.replace(small, groups=groups, weights=(1.0, 1.0))
    together = dataclasses.replace(small, groups=((*small.groups[0], *large.groups[0]),))
    starts = [data.batch(mixture, step, 10).tokens[:, 0].tolist() for step in range(20)]
    counts = collections.Counter(itertools.chain(*starts))
    assert [counts[start] for start in range(40, 400, 4)] == [1] * 90
    assert all(counts[start] >= 10 for start in range(0, 40, 4))
    rows = itertools.chain(*(targets(data.batch(together, step, 10)) for step in range(11)))
    assert collections.Counter(itertools.chain(*rows)) == collections.Counter(
        [*range(1, 41), *range(1, 401)]
    )


# --- from text to store ---


def story(i: int) -> str:
    rng = np.random.default_rng(i)
    return " ".join(rng.choice(WORDS, rng.integers(1, 30)))


@pytest.fixture
def stories(tmp_path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("\n\n".join(story(i) for i in range(400)))
    return path


def opened(tokenizer, tmp_path, *sources, seq_len=16, vocab=EOS + 1, **options) -> data.Corpus:
    options = {"cache": str(tmp_path / "cache"), "documents": "paragraph", **options}
    config = data.Config(source=tuple(map(str, sources)), **options)
    return data.open_corpus(config, tokenizer, seq_len=seq_len, seed=0, vocab=vocab)


def documents(batches) -> collections.Counter:
    """The documents of windows in order, put together again, as text."""
    words, rows = [], [row for batch in batches for row in zip(*batch[:3], strict=True)]
    for tokens, segments, _ in rows:
        real = tokens[segments > 0]
        words += real.tolist() if not words else real[1:].tolist()
    split = " ".join([*WORDS, "\n"][word] for word in words).split("\n")
    return collections.Counter(filter(None, map(str.strip, split)))


def whole(tokenizer, tmp_path, *sources, **options) -> collections.Counter:
    corpus, together = opened(tokenizer, tmp_path, *sources, held_out=1.0, **options), []
    for part in corpus.held_out:  # the windows of another do not overlap with its
        one = dataclasses.replace(corpus, held_out=(part,))
        together.append(documents(data.evaluation(one, 8)))
    return sum(together, collections.Counter())


def test_text_comes_back_from_the_store(tokenizer, tmp_path, stories):
    expected = collections.Counter(story(i) for i in range(400))
    assert whole(tokenizer, tmp_path, stories) == expected
    corpus = opened(tokenizer, tmp_path, stories, held_out=1.0)
    assert corpus.tokens == 0
    batches = list(data.evaluation(corpus, 8))
    predicted = sum(batch.mask.sum() for batch in batches)
    assert predicted == sum(len(story(i).split()) for i in range(400))  # all but the first, and EOS
    halves = [list(data.evaluation(corpus, 8, i, 2)) for i in range(2)]
    for batch, *parts in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(batch.mask, np.concatenate([part.mask for part in parts]))
        assert batch.tokens.shape == (8, 17)


def test_parts_of_a_large_source_are_tokenized_by_themselves(tokenizer, tmp_path, monkeypatch):
    for i, count in enumerate((300, 5, 300, 5, 5)):
        lines = (story(1000 * i + j) for j in range(count))
        (tmp_path / f"{i}.txt").write_text("\n\n".join(lines))
    together, built = whole(tokenizer, tmp_path, tmp_path), []
    monkeypatch.setattr(text_files, "PART", 1 << 13)
    tokenize = store._tokenize

    def spy(source, *rest):
        built.append(sorted(file.name for file in source.files))
        return tokenize(source, *rest)

    monkeypatch.setattr(store, "_tokenize", spy)
    assert whole(tokenizer, tmp_path, tmp_path) == together
    assert ["0.txt"] in built and ["2.txt"] in built
    assert sorted(itertools.chain(*built)) == [f"{i}.txt" for i in range(5)]
    parts = len(built)
    assert 3 <= parts < 5
    corpus = opened(tokenizer, tmp_path, tmp_path, tmp_path / "0.txt", weights=(1.0, 1.0))
    assert [len(group) for group in corpus.groups] == [parts, 1]

    built.clear()
    with (tmp_path / "2.txt").open("a") as file:
        file.write("\n\nw1 w2 w3")
    assert "w1 w2 w3" in whole(tokenizer, tmp_path, tmp_path)
    assert built == [["2.txt"]]

    shutil.rmtree(tmp_path / "cache")
    built.clear()
    locks, lock = [], files.lock
    monkeypatch.setattr(
        files, "lock", lambda path, *x, **y: locks.append(path) or lock(path, *x, **y)
    )
    assert whole(tokenizer, tmp_path, tmp_path) and len(built) == parts
    shutil.rmtree(tmp_path / "cache")
    built.clear()
    with lock(locks[0]):  # as another process that builds this part
        sharing = threading.Thread(target=whole, args=(tokenizer, tmp_path, tmp_path))
        sharing.start()
        while len(built) < parts - 1:
            time.sleep(0.01)
    sharing.join()
    assert len(built) == parts and not list((tmp_path / "cache").glob(".*.lock"))

    shutil.rmtree(tmp_path / "cache")
    built.clear()

    def interrupted(source, *rest):
        if len(built) == 2:
            raise KeyboardInterrupt
        return spy(source, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "_tokenize", interrupted)
        whole(tokenizer, tmp_path, tmp_path)
    whole(tokenizer, tmp_path, tmp_path)
    assert len(built) == parts


def test_held_out_documents_are_never_trained_on(tokenizer, tmp_path, stories):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(story(i) for i in range(100, 600)))
    one, two = (opened(tokenizer, tmp_path, path, held_out=0.1) for path in (stories, other))
    sides = []
    for corpus in (one, two):
        held = set(documents(data.evaluation(corpus, 4)))
        (part,) = corpus.groups[0]
        everything = dataclasses.replace(corpus, held_out=(part,))
        trained = set(documents(data.evaluation(everything, 4)))
        assert not held & trained and 0.05 < len(held) / len(held | trained) < 0.2
        sides.append((held, trained))
    assert not sides[0][0] & sides[1][1] and not sides[1][0] & sides[0][1]


def test_a_last_window_of_a_few_tokens_is_not_all_that_is_held_out(tokenizer, tmp_path, stories):
    corpus = opened(tokenizer, tmp_path, stories, documents="file", held_out=1e-6)
    store = corpus.held_out[0].store
    for seq_len in range(16, 24):
        corpus = opened(
            tokenizer, tmp_path, stories, documents="file", held_out=1e-6, seq_len=seq_len
        )
        (held,) = corpus.held_out
        assert seq_len < held.stop - held.start <= 2 * seq_len and held.stop == store.tokens


@pytest.mark.parametrize(
    "weights",
    [(1.0, float("nan")), (float("inf"), 1.0), (1.0,), (0.0, 1.0), (-1.0, 1.0), (1e-9, 1.0)],
)
def test_weights_that_make_no_mixture(weights):
    with pytest.raises(UserError, match="--data.weights"):
        data.Config(source=("a", "b"), weights=weights)


def test_one_document_gives_its_last_windows(tokenizer, tmp_path, stories):
    corpus = opened(tokenizer, tmp_path, stories, documents="file", held_out=0.1)
    (train,), (held,) = corpus.groups[0], corpus.held_out
    assert (train.start, train.stop, held.stop) == (0, held.start, held.store.tokens)
    assert held.windows == round(0.1 * (train.windows + held.windows))
    with pytest.raises(UserError, match=r"needs at least 15986 tokens .* found \d+ to train on"):
        data.batch(corpus, 0, 1000)


def test_another_source_to_evaluate_on(tokenizer, tmp_path, stories):
    other = tmp_path / "other.txt"
    other.write_text("w1 w2\n\nw3")
    corpus = opened(tokenizer, tmp_path, stories, eval_source=str(other))
    assert corpus.tokens == sum(len(story(i).split()) + 1 for i in range(400))
    assert documents(data.evaluation(corpus, 2)) == collections.Counter(["w1 w2", "w3"])
    assert opened(tokenizer, tmp_path, stories, held_out=0.0).held_out[0].windows == 0


def test_digests_follow_the_content(tokenizer, tmp_path, stories):
    copy = tmp_path / "elsewhere" / "copy.txt"
    copy.parent.mkdir()
    copy.write_bytes(stories.read_bytes())
    one, two = opened(tokenizer, tmp_path, stories), opened(tokenizer, tmp_path / "b", copy)
    assert one.digest == two.digest
    copy.write_text(copy.read_text().replace("w1", "w2", 1))
    assert opened(tokenizer, tmp_path / "b", copy).digest != one.digest


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def misstate(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"training": manifest["training"] - 16}))


@pytest.mark.parametrize(
    "name, damage",
    [*itertools.product(["documents", "sums", "store.json"], [flip, cut, os.remove])]
    + [("tokens", cut), ("tokens", os.remove), ("store.json", misstate)],
)
def test_a_damaged_store_is_built_again(tokenizer, tmp_path, stories, name, damage):
    corpus = opened(tokenizer, tmp_path, stories)
    folder = corpus.held_out[0].store.folder
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".json"}
    damage(folder / name)
    again = opened(tokenizer, tmp_path, stories)
    assert again == corpus
    assert before == {
        file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".json"
    }


def test_damaged_tokens_are_never_read_and_built_again(tokenizer, tmp_path, stories):
    """Only the rows that need a damaged block are refused, and nothing of the file's date helps."""
    corpus = opened(tokenizer, tmp_path, stories, held_out=0.0)
    (part,) = corpus.groups[0]
    path, ordered = part.store.folder / "tokens", dataclasses.replace(corpus, held_out=(part,))
    expected, date = list(data.evaluation(ordered, 4)), path.stat().st_mtime_ns
    assert path.stat().st_size > 2 * data.BLOCK
    flip(path)
    os.utime(path, ns=(date, date))
    np.testing.assert_array_equal(next(data.evaluation(ordered, 4)).tokens, expected[0].tokens)
    for _ in range(2):
        with pytest.raises(UserError, match=r"tokens: it was damaged between the bytes \d+ and"):
            list(data.evaluation(ordered, 4))
    assert opened(tokenizer, tmp_path, stories, held_out=0.0) == corpus
    for found, batch in zip(data.evaluation(ordered, 4), expected, strict=True):
        np.testing.assert_array_equal(found.tokens, batch.tokens)


def test_a_whole_store_is_not_built_again(tokenizer, tmp_path, stories, monkeypatch):
    corpus = opened(tokenizer, tmp_path, stories)
    os.utime(corpus.held_out[0].store.folder / "tokens", (1, 1))  # as a copy would have it
    monkeypatch.setattr(store, "build", None)
    assert opened(tokenizer, tmp_path, stories) == corpus


OPEN = """
import sys, data
config = data.Config(source=(sys.argv[1],), documents="line", cache=sys.argv[2])
print(data.open_corpus(config, sys.argv[3], seq_len=16, seed=0, vocab=1000).digest)
"""


def test_builds_at_once_agree_and_leave_one_store(tokenizer, tmp_path):
    path, cache = tmp_path / "many.txt", tmp_path / "cache"
    path.write_text("\n".join(story(i % 500) for i in range(6000)))
    (dead := subprocess.Popen([sys.executable, "-c", ""])).wait()
    mine, stale = cache / "0.partial", cache / f".0.{platform.node()}-{dead.pid}-01234567-x.partial"
    for folder in (mine, stale):
        folder.mkdir(parents=True)
    command = [sys.executable, "-c", OPEN, str(path), str(cache), str(tokenizer)]
    home = Path(data.__file__).parent
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=home) for _ in range(3)]
    digests = {run.communicate(timeout=60)[0] for run in runs}
    assert len(digests) == 1 and [run.returncode for run in runs] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 3 and {mine, cache / ".lock"} < set(cache.iterdir())


def test_a_full_disk_leaves_a_message_alone(tokenizer, tmp_path, stories):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=os.strerror(errno.EFBIG)):
            opened(tokenizer, tmp_path, stories)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_no_permission_to_write(tokenizer, tmp_path, stories, monkeypatch):
    def refuse(path, *args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:  # root may write anywhere
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
            opened(tokenizer, tmp_path, stories)
    with pytest.raises(UserError, match="choose another folder"):
        opened(tokenizer, tmp_path, stories, cache=str(stories / "below-a-file"))


def test_documents_longer_than_a_piece_are_one_document(tokenizer, tmp_path):
    words = " ".join(story(i) for i in range(4000))
    path = tmp_path / "long.txt"
    path.write_text(words + "\n")
    corpus = opened(tokenizer, tmp_path, path, documents="file", held_out=1.0, seq_len=1000)
    assert len(words) > 10 * records.PIECE
    assert corpus.held_out[0].store.documents == 1
    assert documents(data.evaluation(corpus, 4)) == {words: 1}


def test_mistakes_in_the_config(tokenizer, tmp_path, stories):
    with pytest.raises(UserError, match="ids up to 200, the model's vocabulary has 200"):
        opened(tokenizer, tmp_path, stories, vocab=EOS)
    with pytest.raises(UserError, match="no text to train on"):
        opened(tokenizer, tmp_path)
    for wrong in (
        {"held_out": 1.5},
        {"weights": (0.0,)},
        {"source": ("a",), "weights": (1.0, 2.0)},
    ):
        with pytest.raises(UserError, match="--data"):
            data.Config(**wrong)


# --- prefetch ---


def test_prefetch_keeps_order_and_distance():
    loaded = []
    steps = data.prefetch(lambda step: loaded.append(step) or step, 3, 30, ahead=4)
    for expected in range(3, 30):
        assert next(steps) == expected
        assert len(loaded) <= expected - 3 + 1 + 4
    assert list(steps) == [] and loaded == list(range(3, 30))


def test_an_exception_surfaces_where_the_batch_would():
    def load(step):
        if step == 2:
            raise UserError("no such batch") from OSError("the disk")
        return step

    steps = data.prefetch(load, 0, 10)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(UserError, match="no such batch") as caught:
        next(steps)
    assert isinstance(caught.value.__cause__, OSError)
    assert "load" in [entry.name for entry in caught.traceback]


def test_closing_ends_the_thread():
    """What is being loaded then is waited for: no thread is left to the end of the process."""
    begun, ended = threading.Event(), threading.Event()
    loaded = []

    def load(step):
        if step:
            begun.set()
            time.sleep(0.1)
            ended.set()
        loaded.append(step)
        return step

    steps = data.prefetch(load, 0, 1000, ahead=5)
    assert next(steps) == 0
    begun.wait()
    steps.close()
    assert ended.is_set() and len(loaded) < 4  # what waits for its turn is not loaded
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_nothing_heavy_at_import():
    heavy = ["jax", "tokenizers", "datasets", "pyarrow", "jinja2", "torch", "tqdm"]
    code = f"import data, sys; print([m for m in {heavy} if m in sys.modules])"
    home = Path(data.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_text_in_the_users_own_cache_is_private(tokenizer, tmp_path, stories, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = opened(tokenizer, tmp_path, stories, cache=None).held_out[0].store
    assert store.folder.parent.parent == tmp_path and not store.folder.stat().st_mode & 0o077


def test_a_store_that_others_finished_meanwhile_is_used(tokenizer, tmp_path, stories, monkeypatch):
    build, inodes = store.build, []

    def late(folder, *args):
        build(folder, *args)
        with monkeypatch.context() as patch:  # another host, that does not see the lock
            patch.setattr(store, "build", build)
            patch.setattr(files, "lock", lambda *_, **__: contextlib.nullcontext())
            inodes.append(
                opened(tokenizer, tmp_path, stories).held_out[0].store.folder.stat().st_ino
            )

    monkeypatch.setattr(store, "build", late)
    assert [opened(tokenizer, tmp_path, stories).held_out[0].store.folder.stat().st_ino] == inodes
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_store_that_disappears_is_one_line(tokenizer, tmp_path, stories):
    corpus = opened(tokenizer, tmp_path, stories)
    shutil.rmtree(corpus.held_out[0].store.folder)
    with pytest.raises(UserError, match="cannot be read .No such file.*run this again"):
        data.batch(corpus, 0, 2)


def test_who_waits_for_another_builder_says_so(tokenizer, tmp_path, stories, monkeypatch, capfd):
    monkeypatch.setattr(report, "ELSEWHERE", (0.05, 10.0))
    with files.lock(tmp_path / "cache" / ".lock"):
        waiting = threading.Thread(target=opened, args=(tokenizer, tmp_path, stories))
        waiting.start()
        time.sleep(0.5)
        assert "waiting for another process that tokenizes" in capfd.readouterr().err
    waiting.join()


def test_stores_used_longest_ago_leave_a_cache_that_is_too_large(
    tokenizer, tmp_path, stories, monkeypatch, capsys
):
    texts = [tmp_path / f"{i}.txt" for i in range(4)]
    for i, path in enumerate(texts):
        path.write_text(f"{stories.read_text()} {story(i)}")
    open_texts = lambda *texts, **limit: opened(tokenizer, tmp_path, *texts, **limit)  # noqa: E731
    folders = [open_texts(path).held_out[0].store.folder for path in texts]
    for i, folder in enumerate(folders):
        os.utime(folder / "store.json", (i, i))
    gc.collect()
    (mine := folders[0].parent / "mine").mkdir()
    (mine / "store.json").write_text("{}")
    size = sum(file.stat().st_size for file in folders[0].iterdir()) / 1e9
    corpus = open_texts(texts[0], texts[3], cache_limit=3.5 * size)  # the first is used again now
    assert [folder.exists() for folder in folders] == [True, False, True, True]
    open_texts(texts[0], cache_limit=size / 2)
    assert [folder.exists() for folder in folders] == [True, False, False, True]  # both are in use
    assert data.batch(corpus, 0, 2).tokens.size and mine.exists()
    del corpus
    gc.collect()
    inodes = [folders[i].stat().st_ino for i in (0, 3)]
    open_texts(texts[0], texts[3], cache_limit=size / 2)  # nor what is about to be used
    assert [folders[i].stat().st_ino for i in (0, 3)] == inodes
    monkeypatch.setattr(sys, "argv", ["store", "--cache", str(folders[0].parent)])
    store.main()
    lines = capsys.readouterr().out.splitlines()
    assert [path.name for path in texts if any(str(path) in x for x in lines)] == ["0.txt", "3.txt"]
    assert len(lines) == 2 and all(" kB " in line for line in lines)


def test_a_store_is_kept_where_nobody_can_tell_whether_it_is_used(
    tokenizer, tmp_path, stories, monkeypatch
):
    folder = opened(tokenizer, tmp_path, stories).held_out[0].store.folder
    gc.collect()

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    store.prune(folder.parent, 1e-9)
    assert opened(tokenizer, tmp_path, stories).held_out[0].store.folder == folder
    monkeypatch.undo()
    gc.collect()
    store.prune(folder.parent, 1e-9)
    assert not folder.exists()
