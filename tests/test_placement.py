"""Where a run's arrays lie, what moves between devices, and that neither changes a result."""

import dataclasses
import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_distill import batch_of, config, near, teacher, text  # noqa: F401

import data
import distill
import losses
import models
import optim
import sharding
from models.base import linear
from models.bloom import Bloom
from models.bloom import Config as BloomConfig
from models.llama import Config as LlamaConfig
from models.llama import Llama
from runtime import plan, prepare, results
from runtime.errors import UserError

ADAMW = optim.make(optim.Config(lr=1e-2, warmup=0, schedule="constant", eps=1e-4), 10)
OBJECTIVE = losses.Objective(losses.Config(alpha=0.5), steps=10)
LAYOUT = sharding.Layout()


@functools.cache
def weights_of(family: str, layers: int, vocab: int):
    """Every leaf random, biases too."""
    if family == "bloom":
        kind, config = Bloom, BloomConfig(vocab, 32, layers, 8, tied=True)
    else:
        kind = Llama
        config = LlamaConfig(vocab, 32, 64, layers, 8, 2, 4, qkv_bias=True, tied=False)
    model = eqx.filter_eval_shape(kind, config, jax.random.key(0))
    rng = np.random.default_rng(layers)
    return jax.tree.map(lambda x: 0.15 * rng.standard_normal(x.shape).astype(np.float32), model)


def model_of(family: str, layers: int, vocab: int = 96):
    return jax.tree.map(jnp.array, weights_of(family, layers, vocab))


def three_steps(family, mesh, layout=LAYOUT, vocab=96):
    with sharding.use_mesh(mesh, layout):
        teacher, student = (model_of(family, layers, vocab) for layers in (4, 2))
        teacher, student = (sharding.shard(m, sharding.specs(m, mesh)) for m in (teacher, student))
        state = distill.init_state(student, ADAMW)
        for seed in range(3):
            batch = sharding.from_host(batch_of(seed=seed), mesh)
            state, found = distill.step((teacher, batch), state, ADAMW, OBJECTIVE)
        return state, jax.device_get(found)


@functools.cache
def alone(family: str, vocab: int = 96):
    return three_steps(family, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), vocab=vocab)


@pytest.mark.parametrize(
    ("family", "sizes", "zero"),
    [
        *(("bloom", sizes, 3) for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 8))),
        ("bloom", (2, 2, 2), 1),
        *(("llama", sizes, 3) for sizes in ((1, 1, 8), (2, 2, 2))),
        ("llama", (1, 8, 1), 1),
    ],
    ids=str,
)
def test_three_steps_are_those_of_one_device(family, sizes, zero):
    mesh, layout = sharding.make_mesh(*sizes), sharding.Layout(zero)
    state, found = three_steps(family, mesh, layout)
    whole, expected = alone(family)
    near(state.student, whole.student, 1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    where = plan.state_shardings(state, mesh, layout)
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(spec, leaf.ndim)
    embedding = state.student.embedding
    [moment] = {
        id(leaf): leaf for (path, leaf) in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if ".mu" in jax.tree_util.keystr(path) and ".embedding" in jax.tree_util.keystr(path)
        and "norm" not in jax.tree_util.keystr(path)
    }.values()  # fmt: skip
    shards = sizes[1] * sizes[2] if zero == 3 else sizes[2]
    assert plan.bytes_of(embedding) * shards == embedding.nbytes
    assert plan.bytes_of(moment) * (shards if zero == 3 else 8) == moment.nbytes


@pytest.mark.parametrize(("family", "sizes"), [("bloom", (1, 8, 1)), ("llama", (2, 2, 2))], ids=str)
def test_a_vocabulary_that_does_not_divide_works(family, sizes):
    whole, expected = alone(family, vocab=97)
    state, found = three_steps(family, sharding.make_mesh(*sizes), vocab=97)
    assert state.student.embedding.shape == whole.student.embedding.shape
    near(state.student, whole.student, 1e-5)
    for name in ("loss", "divergence", "ce", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_rules_can_be_told():
    layout = sharding.Layout(3, ("vocab=tensor", "mlp=fsdp,tensor", "embed="))
    mesh = sharding.make_mesh(1, 4, 2)
    state, _ = three_steps("llama", mesh, layout)
    assert state.student.blocks.up.sharding.spec[:2] == (None, ("fsdp", "tensor"))
    assert state.student.embedding.sharding.spec[0] == "tensor"
    near(state.student, alone("llama")[0].student, 1e-5)
    for wrong in ("vocab", "words=fsdp", "vocab=pipe", "vocab=fsdp,fsdp"):
        with pytest.raises(UserError, match="--mesh.rules"):
            sharding.Layout(3, (wrong,))


# ---- what the compiled program says --------------------------------------------------------------


def program_of(mesh, vocab: int, embed: int, rows: int, seq: int):
    def model(layers):
        return lambda key: Bloom(BloomConfig(vocab, embed, layers, 8, tied=True), key)

    with sharding.use_mesh(mesh):
        key = jax.random.key(0)
        state = eqx.filter_eval_shape(lambda: distill.init_state(model(4)(key), ADAMW))
        places = plan.state_shardings(state, mesh, LAYOUT)
        state = plan.with_shardings(state, places)
        teacher = eqx.filter_eval_shape(model(8), key)
        teacher = plan.with_shardings(teacher, sharding.specs(teacher, mesh))
        split = sharding.row_sharding(mesh)
        ids = jax.ShapeDtypeStruct((rows, seq + 1), jnp.int32, sharding=split)
        mask = jax.ShapeDtypeStruct((rows, seq), bool, sharding=split)
        frozen = teacher, data.Batch(ids, ids, mask)
        return plan.compile_abstract(distill.step, (frozen, state), ADAMW, OBJECTIVE), state


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(")


def collectives(program) -> list[tuple[str, tuple[int, ...]]]:
    """The kind of every collective operation, with each shape that results."""
    found = []
    for shapes, kind in COLLECTIVE.findall(program.as_text()):
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
            found.append((kind, tuple(int(size) for size in dims.split(",") if size)))
    return found


def test_weights_are_gathered_and_heads_and_logits_stay_where_they_are():
    vocab, embed = 4096, 64
    program, _ = program_of(sharding.make_mesh(), vocab, embed, rows=8, seq=32)
    found = collectives(program)
    gathered = {shape for kind, shape in found if kind == "all-gather"}
    assert any(set(shape) >= {4 * embed, embed} for shape in gathered), gathered
    # Neither a head, nor its gradient, nor an activation over all words is ever in one place.
    whole = [(kind, shape) for kind, shape in found if vocab in shape]
    assert not whole
    reduced = {shape for kind, shape in found if kind in ("reduce-scatter", "all-reduce")}
    # Rows of the embedding are exchanged by columns: nobody adds up those of all devices.
    assert (8, 32, embed) not in reduced
    assert any(np.prod(shape) in (4 * embed * embed, 4 * embed * embed // 8) for shape in reduced)


def test_eight_devices_hold_an_eighth_each():
    sizes = {}
    for count in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:count])
        program, state = program_of(mesh, 250880, 256, rows=8, seq=128)
        found = program.memory_analysis()
        sizes[count] = plan.bytes_of(state), found.temp_size_in_bytes
    for whole, part in zip(sizes[1], sizes[8], strict=True):
        assert part <= whole / 6, sizes


# ---- a teacher on devices of its own, and several processes --------------------------------------


def test_a_teacher_on_devices_of_its_own_teaches_the_same(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(results, "samples", lambda *_: iter(()))
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        together = models.load(distill.train(config))
    mesh = distill.Mesh(1, 2, 2)
    apart = dataclasses.replace(
        config, teacher_devices=4, microbatches=4, mesh=mesh, out=config.out + "-apart"
    )
    placed, teacher_states = [], prepare.teacher_states

    def spy(teacher, batch, *, dtype):
        placed.append({d.id for leaf in jax.tree.leaves(teacher) for d in leaf.devices()})
        return teacher_states(teacher, batch, dtype=dtype)

    monkeypatch.setattr(prepare, "teacher_states", spy)
    near(models.load(distill.train(apart)), together, 1e-5)
    assert len(placed) >= 6 and all(ids == {4, 5, 6, 7} for ids in placed)
    for count, message in ((8, "the student needs"), (3, "does not divide")):
        with pytest.raises(UserError, match=message):
            distill.train(dataclasses.replace(config, teacher_devices=count, mesh=distill.Mesh(
                fsdp=1, data=-1 if count == 8 else 1, tensor=1 if count == 8 else 5)))  # fmt: skip


def test_gradients_of_weights_are_sums_in_float32():
    """In bfloat16 the parts of many devices would be rounded before they are added."""
    x, d_y = jax.random.normal(jax.random.key(0), (2, 512, 24)), jnp.ones((2, 512, 8))
    x, d_y = x.astype(jnp.bfloat16), d_y.astype(jnp.bfloat16)
    weight = jnp.zeros((2, 4, 24))
    _, pull = jax.vjp(lambda weight: linear("bse,hde->bshd", x, weight), weight)
    (d_weight,) = pull(d_y.reshape(2, 512, 2, 4))
    exact = np.asarray(x, np.float64).reshape(-1, 24).sum(0)
    np.testing.assert_allclose(d_weight, np.broadcast_to(exact, (2, 4, 24)), rtol=2e-5, atol=1e-4)
