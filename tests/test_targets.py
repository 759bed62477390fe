"""Targets on disk: their bits, the folder they lie in, how it is made, and what is refused."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import zlib
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_distill import one_device, teacher  # noqa: F401

import data
import distill
import losses
import models
import optim
import sharding
import student
import targets
import text as texts
from models.llama import Llama
from runtime import errors, results, target_store
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
VOCAB, SEQ = 2048, 16
unhurried = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# ---- numbers as bits ----


@unhurried
@given(st.integers(1, 32), st.integers(0, 40), st.integers(1, 3), st.randoms(use_true_random=False))
def test_ids_are_packed_bit_after_bit(width, n, rows, random):
    values = [[random.getrandbits(width) for _ in range(n)] for _ in range(rows)]
    packed = target_store.pack(np.array(values, np.int64).reshape(rows, n), width)
    assert packed.shape == (rows, -(-n // 8) * width)
    for row, numbers in zip(packed, values, strict=True):
        whole = sum(number << width * i for i, number in enumerate(numbers))
        assert int.from_bytes(row.tobytes(), "little") == whole
    if width < 32:
        np.testing.assert_array_equal(target_store.unpack(packed, width, n), values)


def bound(log_p):
    return 0.023 * np.sqrt(-log_p) + 0.0003


def test_a_packed_value_is_within_its_bound():
    log_p = np.append(-np.geomspace(1e-9, 32, 5001), 0).astype(np.float32)
    off = np.abs(target_store.DECODED[target_store.encode(log_p)] - log_p)
    assert (off <= bound(log_p)).all() and off.max() > 0.1
    for u in np.float32([[0], [0.3], [0.999999]]):
        off = np.abs(target_store.DECODED[target_store.encode(log_p, u)] - log_p)
        assert (off <= 2 * bound(log_p)).all()
    ends = np.float32([-np.inf, -1e9, -40, 1e-7])
    for u in (None, np.float32([0.5])):
        assert target_store.DECODED[target_store.encode(ends, u)].tolist() == [-np.inf, -32, -32, 0]


def test_drawn_values_are_rounded_without_bias_and_in_order():
    log_p = -np.sort(np.random.default_rng(0).uniform(0, 31, 500)).astype(np.float32)
    u = ((np.arange(20_000) + 0.5) / 20_000).astype(np.float32)[:, None]
    found = target_store.DECODED[target_store.encode(log_p, u)]
    means = np.exp(found.astype(np.float64)).mean(0)
    np.testing.assert_allclose(means, np.exp(log_p.astype(np.float64)), rtol=1e-4)
    assert (np.diff(found, axis=1) <= 0).all()  # so the larger of two stays the larger


# ---- a folder of targets ----


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "few.txt"
    stories = (ROOT / "demo" / "stories.txt").read_text().split("\n\n")[:12]
    path.write_text("\n\n".join(stories))
    return path


@pytest.fixture(scope="module")
def config(teacher, text) -> targets.Config:
    return targets.Config(
        teacher=str(teacher), out="", seq_len=SEQ, batch_size=8, top_k=6, quiet=True,
        data=data.Config(source=(str(text),), documents="paragraph", cache=str(text.parent)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def kept(config, tmp_path_factory) -> target_store.Targets:
    """Targets of both kinds of values share this one; they are not to be changed."""
    return made(config, tmp_path_factory.mktemp("kept") / "targets")


def made(config, out: Path, **changes) -> target_store.Targets:
    targets.make(dataclasses.replace(config, out=str(out), **changes))
    return target_store.load(out)


def corpus_of(config) -> data.Corpus:
    return data.open_corpus(
        config.data, config.teacher, seq_len=config.seq_len, seed=config.seed, vocab=VOCAB
    )


def computed(config, windows, **changes) -> losses.Targets:
    batch, model = data.read(corpus_of(config), windows), models.load(config.teacher)
    about = like(Path(), **{"entries": 6} | changes)
    return jax.device_get(targets.targets_of(model, batch, windows, about, chunk=64))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


@pytest.mark.parametrize("kind", ["top-k", "draws"])
def test_what_is_read_is_what_the_teacher_says(config, tmp_path, kind):
    entries = {"top_k": None, "draws": 9} if kind == "draws" else {"top_k": 9}
    exact = made(config, tmp_path / "exact", values="float32", temperature=1.5, **entries)
    packed = made(config, tmp_path / "packed", temperature=1.5, **entries)
    windows = np.random.default_rng(0).permutation(corpus_of(config).windows)[:11]
    wanted = computed(config, windows, kind=kind, entries=9, temperature=1.5)
    found = target_store.read(exact, windows)
    assert (
        type(found) is type(wanted) is {"top-k": losses.TopK, "draws": losses.SampledTargets}[kind]
    )
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-4)
    np.testing.assert_allclose(found.rest, wanted.rest, atol=1e-4)
    coarse = target_store.read(packed, windows)
    np.testing.assert_array_equal(coarse.ids, wanted.ids)
    mass = np.exp(coarse.log_probs).sum(-1) + np.exp(coarse.rest)
    if kind == "top-k":
        np.testing.assert_allclose(mass, 1, atol=1e-5)
    both = [np.append(kept.log_probs, kept.rest[..., None], -1) for kept in (coarse, wanted)]
    off, far = np.abs(both[0] - both[1]), bound(np.maximum(both[1], -32))
    if kind == "draws":
        far *= 2
    else:  # made to add up to 1 again, each moves with all
        far += 1.1 * (np.exp(both[1]) * far).sum(-1, keepdims=True)
    off = np.where(both[1] > -32, off, 0)
    assert off.max() > 0 and (off <= far).all()


def test_packed_draws_have_the_mean_of_exact_ones(tmp_path):
    """What a draw stands for, over many seeds of the rounding."""
    ids = np.arange(8, dtype=np.int32).reshape(1, 1, 8)
    log_probs = np.log(np.float32([0.5, 0.2, 0.1, 0.05, 0.03, 0.021, 0.019, 0.001]))
    rest = np.log(np.float32(0.02))
    draws = losses.SampledTargets(ids, log_probs.reshape(1, 1, 8), rest.reshape(1, 1))
    blank = like(tmp_path, kind="draws", entries=8, seq_len=1, vocab=100)
    found = []
    for seed in range(1500):
        folder = dataclasses.replace(blank, seed=seed)
        (record,) = target_store.records(folder, draws, np.array([7]))
        values = target_store.DECODED[record["values"][0]]
        found.append(np.exp(np.maximum(values[:-1], values[-1]).astype(np.float64)))
    wanted = np.exp(np.maximum(log_probs, rest).astype(np.float64))
    spread = np.std(found, axis=0) / 1500**0.5
    assert (np.abs(np.mean(found, axis=0) - wanted) < 4.5 * spread + 1e-6).all()
    assert (spread > 0).all()


def like(folder, **changes) -> target_store.Targets:
    about = {
        "folder": folder, "windows": np.arange(1), "teacher": "", "teacher_name": "",
        "tokenizer": "", "data": "", "data_flags": {}, "seq_len": 1024, "vocab": 250_880,
        "temperature": 1.0, "dtype": "float32", "kind": "top-k", "entries": 32, "values": "packed",
        "seed": 0, "shard": 1, "index": 0,
    }  # fmt: skip
    return target_store.Targets(**about | changes)


def test_bytes_per_token(kept):
    assert like(Path()).record.itemsize / 1024 <= 110
    assert like(Path(), kind="draws", entries=16).record.itemsize / 1024 <= 64
    size = sum(path.stat().st_size for path in kept.folder.glob("*.targets"))
    assert size == len(kept.windows) * kept.record.itemsize


def test_training_on_all_that_a_teacher_says_is_training_beside_it(config, teacher, tmp_path):
    """Through the disk, the student and its gradients."""
    whole = made(config, tmp_path, values="float32", top_k=VOCAB, steps=1, temperature=2.0)
    corpus = corpus_of(config)
    windows = data.windows(corpus, 0, config.batch_size)
    batch, model = data.read(corpus, windows), models.load(teacher)
    student = Llama(dataclasses.replace(model.config, layers=1), jax.random.key(0))
    objective = losses.Objective(losses.Config("jsd", 0.7, temperature=2.0, chunk=64))

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def step(student, batch, teacher):
        hidden = student.hidden(batch.tokens[:, :-1], batch.segments[:, :-1])
        labels, signal = batch.tokens[:, 1:], batch.signal
        if teacher is not None:
            signal = losses.teacher_states(teacher, batch)
        arrays = hidden, student.unembedding, signal, labels, batch.mask
        return losses.distill_loss(*arrays, objective=objective, step=0)[0]

    asked = step(student, batch, model)
    stored = step(student, batch._replace(signal=target_store.read(whole, windows)), None)
    assert stored[0] == pytest.approx(float(asked[0]), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (stored[1], asked[1])), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_a_run_learns_from_them_without_a_teacher(
    config, teacher, tmp_path, monkeypatch, one_device
):
    """As beside the teacher, and when it is continued."""
    whole = made(config, tmp_path / "targets", values="float32", top_k=VOCAB, steps=4)
    start = tmp_path / "start"
    models.save(student.cut(models.load(teacher), {"layers": (1,)}), start, tokenizer=teacher)
    run = distill.Config(
        teacher=str(teacher), student=str(start), seq_len=SEQ, batch_size=8, steps=4,
        eval_every=4, eval_windows=8, save_every=2, log_every=1, data=config.data, quiet=True,
        optim=optim.Config(lr=1e-2, eps=1e-4), out=str(tmp_path / "beside"),
    )  # fmt: skip
    monkeypatch.setattr(results, "samples", lambda *_: ())
    online = models.load(distill.train(run))
    alone = dataclasses.replace(
        run, teacher=None, data=data.Config(cache=config.data.cache), seq_len=None,
        targets=str(whole.folder), out=str(tmp_path / "alone"),
    )  # fmt: skip
    load, sources = models.load, []
    monkeypatch.setattr(
        models, "load", lambda source, **how: sources.append(source) or load(source, **how)
    )
    student_alone = load(distill.train(alone))
    assert sources == [str(start)]
    for a, b in zip(*map(jax.tree.leaves, (student_alone, online)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    out = Path(alone.out)
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "checkpoints" / "4")
    continued = load(distill.train(alone))
    assert eqx.tree_equal(continued, student_alone)
    with pytest.raises(UserError, match="--targets with --loss.alpha 0"):
        dataclasses.replace(alone, loss=losses.Config(alpha=0.0))


def test_flags_beside_targets_are_not_dropped(config, kept, teacher, text, tmp_path):
    flags = ["--targets", str(kept.folder), "--data.cache", str(text.parent), "--quiet"]
    flags += ["--out", str(tmp_path / "run"), "--student-layers", "1", "--batch-size", "8"]
    found = distill.with_defaults(errors.cli(distill.Config, flags))
    assert found.data.source == config.data.source and found.data.documents == "paragraph"
    other = errors.cli(distill.Config, [*flags, "--data.held-out", "0.3"])
    assert distill.with_defaults(other).data.held_out == 0.3
    assert "--data flags that give another" in refusal(distill.train, other)


def test_a_folder_of_targets_knows_its_files_from_anywhere(config, text, tmp_path, monkeypatch):
    monkeypatch.chdir(text.parent)
    here = dataclasses.replace(config.data, source=("few.*", text.name))
    found = made(config, tmp_path / "targets", data=here, teacher=os.path.relpath(config.teacher))
    assert Path(found.teacher_name).is_absolute() and Path(found.teacher_name).samefile(
        config.teacher
    )
    assert found.data_config.source == (str(text.parent / "few.*"), str(text))


def test_steps_keep_what_a_run_of_them_reads(config, kept, tmp_path):
    few = made(config, tmp_path, steps=2, seed=4)
    corpus = dataclasses.replace(corpus_of(config), seed=4)
    asked = np.concatenate([data.windows(corpus, step, config.batch_size) for step in (0, 1)])
    np.testing.assert_array_equal(few.windows, np.unique(asked))
    assert len(few.windows) == 16 < len(kept.windows) == corpus.windows
    for one, other in zip(
        target_store.read(few, asked), target_store.read(kept, asked), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    run = {"loss": losses.Config(), "tokenizer": Path(config.teacher), "vocab": VOCAB}
    target_store.check(few, corpus, rows=16, **run)
    target_store.check(kept, corpus, rows=10**6, **run)
    for other, rows in ((corpus, 24), (dataclasses.replace(corpus, seed=5), 16)):
        with pytest.raises(UserError, match="not among the 16 kept.*--steps"):
            target_store.check(few, other, rows=rows, **run)


# ---- making them ----


def test_on_a_mesh_and_in_other_batches_they_are_the_same(config, kept, tmp_path):
    mesh = sharding.Sizes(data=2, fsdp=2, tensor=2)
    other = made(config, tmp_path, mesh=mesh, batch_size=12, chunk=40)
    windows = kept.windows
    found, wanted = target_store.read(other, windows), target_store.read(kept, windows)
    same = (found.ids == wanted.ids).all(-1)
    assert same.mean() > 0.999  # but for near ties
    # a value on an edge may be rounded the other way
    assert np.abs(found.log_probs - wanted.log_probs)[same].max() < 2 * bound(-32.0)
    assert np.abs(found.log_probs - wanted.log_probs)[same].mean() < 1e-3


def write(folder: target_store.Targets, index=0, count=1, stop=None) -> None:
    """What `make` does, without its device programs: records of a formula."""
    todo = target_store.unwritten(folder, index, count)[:stop]
    for i in range(0, len(todo), 3):
        places = todo[i : i + 3]
        target_store.append(folder, formula(folder, folder.windows[places]), places)


def formula(folder: target_store.Targets, windows) -> losses.TopK:
    rngs = [np.random.default_rng(window) for window in windows.tolist()]
    shape = (folder.seq_len, folder.entries)
    ids = np.stack([rng.integers(0, folder.vocab, shape) for rng in rngs])
    log_p = np.stack([np.log(rng.dirichlet(np.ones(shape[1] + 1), shape[0])) for rng in rngs])
    return losses.TopK(ids, log_p[..., :-1].astype("f4"), log_p[..., -1].astype("f4"))


def small(folder: Path, **changes) -> target_store.Targets:
    windows = np.array([1, 2, 5, 6, 9, 13, 14, 20, 31, 40, 41])
    about = {"windows": windows, "seq_len": 5, "vocab": 300, "entries": 3, "shard": 4}
    about["index"] = zlib.crc32(windows.astype("<i8").tobytes())
    return target_store.open_or_create(like(folder, **about | changes))


@unhurried
@given(st.data())
def test_wherever_it_was_killed_it_goes_on(tmp_path_factory, draw):
    whole = small(tmp_path_factory.mktemp("whole"))
    write(whole)
    wanted = contents(whole.folder)
    folder = tmp_path_factory.mktemp("killed")
    for _ in range(draw.draw(st.integers(1, 3))):  # killed so often
        begun = small(folder)
        write(begun, stop=draw.draw(st.integers(0, 11)))
        shards = sorted(folder.glob("*.targets"))
        if shards:  # the last write may have come to the disk in part, or as something else
            size = shards[-1].stat().st_size
            os.truncate(shards[-1], draw.draw(st.integers(max(0, size - 80), size)))
            with open(shards[-1], "ab") as file:
                file.write(draw.draw(st.binary(max_size=30)))
    write(small(folder))
    assert contents(folder) == wanted
    assert len(target_store.unwritten(target_store.load(folder))) == 0


def test_a_shard_of_full_size_that_ends_in_zeros_is_written_again(tmp_path):
    folder = small(tmp_path)
    write(folder)
    wanted, shard = contents(tmp_path), folder.path(1)
    size = shard.stat().st_size
    os.truncate(shard, size - folder.record.itemsize - 1)
    os.truncate(shard, size)
    write(small(tmp_path))
    assert contents(tmp_path) == wanted


def test_processes_write_shards_of_their_own(tmp_path):
    one, three = small(tmp_path / "one"), small(tmp_path / "three")
    write(one)
    for index in (2, 0, 1):
        before = set(contents(three.folder))
        write(three, index, 3)
        assert set(contents(three.folder)) - before == {f"{index:05}.targets"}
    assert contents(one.folder) == contents(three.folder)


def test_a_run_that_is_interrupted_is_continued(config, kept, tmp_path, monkeypatch):
    append, calls = target_store.append, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(*args)

    monkeypatch.setattr(targets, "append", dying)
    with pytest.raises(KeyboardInterrupt):
        made(config, tmp_path)
    with pytest.raises(UserError, match="00000.targets.*the same command"):
        target_store.load(tmp_path)
    made(config, tmp_path)
    assert len(calls) == 3 + -(-len(kept.windows) // 8) - 2  # none is computed twice
    assert contents(tmp_path) == contents(kept.folder)
    monkeypatch.setattr(models, "load", None)
    made(config, tmp_path)  # there is nothing to be done, not even to load the teacher


# ---- what is refused ----


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_any_flipped_bit_is_refused(tmp_path):
    folder = small(tmp_path).folder
    write(small(tmp_path))
    windows = small(tmp_path).windows
    everything = contents(folder)
    rng = np.random.default_rng(0)
    for name, content in everything.items():
        for bit in rng.choice(8 * len(content), min(8 * len(content), 80), replace=False):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(changed)
            text = refusal(lambda: target_store.read(target_store.load(folder), windows))
            assert str(folder) in text
            assert "altered" in text or name == target_store.MANIFEST  # or of another version
        (folder / name).write_bytes(content)
    target_store.read(target_store.load(folder), windows)


def test_records_of_another_place_or_of_other_targets_are_refused(tmp_path):
    folder = small(tmp_path / "one")
    other = small(tmp_path / "other", temperature=2.0)
    write(folder), write(other)
    one, two = folder.path(0), folder.path(1)
    for source in (two, other.path(0)):
        content = one.read_bytes()
        shutil.copy(source, one)
        assert "altered: remove the file" in refusal(target_store.read, folder, folder.windows)
        one.write_bytes(content)
    one.unlink()
    assert "00000.targets: it is not whole" in refusal(target_store.load, folder.folder)
    assert "cannot be read" in refusal(target_store.read, folder, folder.windows)
    (folder.folder / target_store.MANIFEST).unlink()
    assert "no targets.json in it" in refusal(target_store.load, folder.folder)
    assert "no targets.json in it" in refusal(target_store.load, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change", [{"shard": 0}, {"seq_len": -8}, {"entries": 0}, {"data_flags": {"sauce": []}}]
)
def test_a_manifest_that_makes_no_sense_is_refused(kept, tmp_path, change):
    shutil.copytree(kept.folder, tmp_path / "kept")
    other = dataclasses.replace(kept, **change)
    manifest = other.manifest | {"digest": other.digest}
    (tmp_path / "kept" / "targets.json").write_text(json.dumps(manifest))
    assert "targets.json: it or windows beside it" in refusal(target_store.load, tmp_path / "kept")


def test_wrong_types_and_paths_of_others_in_a_manifest_are_one_line(kept, config, tmp_path):
    copy, corpus, accepted = tmp_path / "kept", corpus_of(config), []
    shutil.copytree(kept.folder, copy)
    changes = [{name: value} for name in [*kept.manifest][1:] for value in WRONG]
    changes += [
        {"data_flags": kept.data_flags | {name: value}}
        for name in kept.data_flags
        for value in WRONG
    ]
    for change in changes:
        manifest = kept.manifest | change
        signed = manifest | {"digest": texts.digest(manifest)}
        (copy / "targets.json").write_text(json.dumps(signed))
        try:
            targets = target_store.load(copy)
            asked = distill.with_defaults(distill.Config(targets=str(copy), student_layers=2))
            target_store.check(
                targets, corpus, losses.Config(), tokenizer=Path(config.teacher), vocab=VOCAB,
                rows=8,
            )  # fmt: skip
            target_store.read(targets, targets.windows[:1])
            texts.find(asked.data.source[0])
            accepted.append(change)
        except UserError as error:
            assert len(str(error)) < 1000, change
    assert len(accepted) < len(changes) / 10, accepted


WRONG = (None, "x", "/home/other/x", ["x", 5], {"a": 1}, 1.5, -1, True, 10**30)


def test_the_cache_of_another_machine_is_not_ours(kept):
    flags = kept.data_flags | {"cache": "/home/somebody/cache"}
    assert dataclasses.replace(kept, data_flags=flags).data_config.cache is None


def test_a_mismatch_names_both_sides(config, kept, teacher, text, tmp_path):
    corpus = corpus_of(config)
    run = {"loss": losses.Config(), "tokenizer": teacher, "vocab": VOCAB, "rows": 8}
    target_store.check(kept, corpus, teacher=teacher, **run)

    def refused(corpus=corpus, **changes):
        return refusal(target_store.check, kept, corpus, **run | changes)

    twin = tmp_path / "twin"  # of another name, but the same
    shutil.copytree(teacher, twin)
    target_store.check(kept, corpus, teacher=twin, **run)
    weights = twin / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    message = refused(teacher=twin)
    assert str(teacher) in message and str(twin) in message

    words = (teacher / "tokenizer.json").read_text()
    (twin / "tokenizer.json").write_text(words.replace('"[PAD]"', '"[pad]"') + "\n")
    message = refused(tokenizer=twin)
    assert str(teacher) in message and str(twin) in message and "tokenizer" in message

    message = refused(corpus=dataclasses.replace(corpus, seq_len=32))
    assert f"windows of {SEQ}" in message and "--seq-len 32" in message
    longer = tmp_path / "longer.txt"
    longer.write_text(text.read_text() + "\n\nThe end of it all.")
    source = dataclasses.replace(config.data, source=(str(longer),))
    message = refused(corpus=corpus_of(dataclasses.replace(config, data=source)))
    assert str(text) in message and "--data" in message
    assert "a vocabulary of 2048, but this run has one of 2000" in refused(vocab=2000)
    message = refused(loss=losses.Config(temperature=2.0))
    assert "temperature 1, but this run has --loss.temperature 2" in message
    schedule = losses.Config(temperature_end=3.0, temperature_schedule="linear")
    assert "--loss.temperature 1 to 3" in refused(loss=schedule)
    draws = dataclasses.replace(kept, kind="draws")
    jsd = run | {"loss": losses.Config("jsd")}
    assert "--loss.divergence jsd" in refusal(target_store.check, draws, corpus, **jsd)
    for name in losses.DIVERGENCES:
        target_store.check(kept, corpus, **run | {"loss": losses.Config(name)})


def test_other_targets_are_not_continued(config, kept, tmp_path):
    shutil.copytree(kept.folder, tmp_path / "kept")
    for changes, words in (
        ({"temperature": 2.0}, "temperature was 1.0, is 2.0"),
        ({"draws": 8, "top_k": None}, "kind was top-k, is draws"),
        ({"steps": 1}, f"windows was {len(kept.windows)}, is 8"),
    ):
        assert words in refusal(made, config, tmp_path / "kept", **changes)
    assert contents(tmp_path / "kept") == contents(kept.folder)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--top-k", "4", "--draws", "9"], ["--top-k 4", "--draws 9", "one or the other"]),
        (["--draws", "7"], ["--draws is 7", "8 or more"]),
        (["--top-k", "0"], ["--top-k is 0"]),
        (["--temperature", "0"], ["--temperature is 0.0"]),
        (["--seed", "-1"], ["--seed is -1", "from 0"]),
        (["--seq-len", "65"], ["--seq-len 65", "64 positions"]),
        (["--top-k", "2049"], ["--top-k 2049", "2048 tokens"]),
        (["--draws", "2048"], ["--draws 2048", "2048 tokens"]),
        (["--values", "int4"], ["--values", "packed", "float32"]),
        (["--mesh.data", "3"], ["mesh data 3"]),
    ],
)
def test_flags_that_make_no_sense_are_refused(teacher, text, tmp_path, flags, words):
    source = ["--data.source", str(text), "--data.cache", str(text.parent)]
    args = ["--teacher", str(teacher), "--out", str(tmp_path / "out"), *source, *flags]
    message = refusal(lambda: targets.make(errors.cli(targets.Config, args)))
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_text_must_be_named(teacher, tmp_path):
    args = ["--teacher", str(teacher), "--out", str(tmp_path)]
    assert "--data.source is missing" in refusal(errors.cli, targets.Config, args)


def test_a_full_disk_loses_nothing(config, kept, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    shard = kept.path(0).stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (shard // 2, before[1]))
        message = refusal(made, config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in message and os.strerror(errno.EFBIG) in message
    assert (tmp_path / "00000.targets").stat().st_size > shard // 3
    made(config, tmp_path)
    assert contents(tmp_path) == contents(kept.folder)


def test_a_folder_in_use_is_refused(config, tmp_path):
    with targets.checkpoint.lock(tmp_path):
        assert "in use by another run" in refusal(made, config, tmp_path)


@pytest.mark.parametrize("name", ["windows", "00000.targets"])
@pytest.mark.parametrize("home", ["~", "~nobody-of-this-name"])
def test_a_file_of_the_users_in_the_folder_is_not_overwritten(
    config, tmp_path, monkeypatch, name, home
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = Path(os.path.expanduser(home)) / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    remedy = f"{name} is in it, but no targets.json: move it away"
    assert remedy in refusal(made, config, Path(home, "out"))
    assert path.read_text() == "mine"
