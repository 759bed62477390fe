"""The optimizers against their formulas in float64, and what a step must leave alone."""

import importlib.util
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import optim
import sharding
from runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("strict")

STEPS = 10


class Block(eqx.Module):
    norm: Float[Array, " embed"]
    qkv: Float[Array, "heads 3 head_dim embed"]
    qkv_bias: Float[Array, "heads 3 head_dim"]
    output: Float[Array, "embed heads head_dim"]
    up: Float[Array, "mlp embed"]
    up_bias: Float[Array, " mlp"]


class Model(eqx.Module):
    embedding: Float[Array, "vocab embed"]
    blocks: Block
    norm: Float[Array, " embed"]
    head: Float[Array, "vocab embed"] | None


MATRICES = {"embedding", "blocks.qkv", "blocks.output", "blocks.up"}
SHAPES = {
    "embedding": (24, 8),
    "blocks.norm": (3, 8),
    "blocks.qkv": (3, 2, 3, 4, 8),
    "blocks.qkv_bias": (3, 2, 3, 4),
    "blocks.output": (3, 8, 2, 4),
    "blocks.up": (3, 16, 8),
    "blocks.up_bias": (3, 16),
    "norm": (8,),
}


def values(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def model(values):
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    block = Block(
        **{n.removeprefix("blocks."): arrays[n] for n in arrays if n.startswith("blocks")}
    )
    return Model(arrays["embedding"], block, arrays["norm"], None)


def arrays(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@eqx.filter_jit
def update(optimizer, grads, state, params, step):
    return optimizer.update(grads, state, params, step)


def trained(config, steps, scale=1.0):
    """Our parameters after `steps` updates, and the statistics of each."""
    optimizer, params, seen = optim.make(config, STEPS), model(values(0)), []
    state = optimizer.init(params)
    for step in range(steps):
        grads = model(values(step + 1, scale))
        params, state, stats = update(optimizer, grads, state, params, jnp.array(step, jnp.int32))
        seen.append({name: float(value) for name, value in stats.items()})
    return params, state, seen


def adamw(m, v, g, t, b1, b2, eps=1e-8):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return m, v, (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def lion(m, v, g, t, b1, b2):
    return b2 * m + (1 - b2) * g, v, np.sign(b1 * m + (1 - b1) * g)


def sgd(m, v, g, t, momentum):
    m = momentum * m + g
    return m, v, m


RULES = {"adamw": (adamw, (0.8, 0.9)), "lion": (lion, (0.8, 0.9)), "sgd": (sgd, (0.7,))}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_step_equals_its_formula(name, steps, clip):
    config = optim.Config(
        name, lr=0.02, lr_end=0.01, warmup=2, schedule="linear", weight_decay=0.3, clip=clip,
        betas=(0.8, 0.9), momentum=0.7,
    )  # fmt: skip
    rule, settings = RULES[name]
    params = {n: np.float32(p).astype(np.float64) for n, p in values(0).items()}
    moments = {n: (np.zeros_like(p), np.zeros_like(p)) for n, p in params.items()}
    rates = [0.01, 0.02, 0.02, 0.02 - 0.01 / 8]
    norms = []
    for t in range(1, steps + 1):
        grads = {n: np.float32(g).astype(np.float64) for n, g in values(t).items()}
        norms.append(np.sqrt(sum((g**2).sum() for g in grads.values())))
        assert norms[-1] > 1.5  # the clip bites
        for n, g in grads.items():
            g = g * (clip / norms[-1]) if clip else g
            *moments[n], direction = rule(*moments[n], g, t, *settings)
            decay = 0.3 * params[n] if n in MATRICES else 0
            params[n] = params[n] - rates[t - 1] * (direction + decay)
    ours, _, stats = trained(config, steps)
    np.testing.assert_allclose([s["grad_norm"] for s in stats], norms, rtol=1e-6)
    np.testing.assert_allclose([s["lr"] for s in stats], rates[:steps], rtol=1e-6)
    for n, ours_n in arrays(ours).items():
        np.testing.assert_allclose(ours_n, params[n], rtol=2e-6, atol=2e-6, err_msg=n)


def test_a_gradient_within_the_clip_is_left_as_it_is():
    config = optim.Config("sgd", weight_decay=0.0, clip=1.0)
    clipped, _, stats = trained(config, 3, scale=1e-3)
    free, _, _ = trained(optim.Config("sgd", weight_decay=0.0, clip=0.0), 3, scale=1e-3)
    assert max(s["grad_norm"] for s in stats) < 1
    assert eqx.tree_equal(clipped, free)


def test_decay_alone_touches_matrices_and_nothing_else():
    optimizer = optim.make(optim.Config("adamw", lr=0.1, weight_decay=0.5, warmup=0), STEPS)
    params = model(values(0))
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _, _ = update(optimizer, zero, optimizer.init(params), params, jnp.array(0))
    before, after = arrays(params), arrays(after)
    for name in before:
        expected = before[name] * np.float32(0.95) if name in MATRICES else before[name]
        np.testing.assert_allclose(after[name], expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("embed",), False),
        (("layers", "embed"), False),
        (("layers", "heads", "3", "head_dim"), False),
        (("layers", "2", "embed"), False),
        (None, False),
        (("vocab", "embed"), True),
        (("embed", "mlp"), True),
        (("layers", "heads", "3", "head_dim", "embed"), True),
    ],
)
def test_matrices_are_told_by_their_axes(axes, expected):
    assert optim.is_matrix(axes) is expected


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_frozen_leaves_keep_their_bits_and_have_no_state(name):
    optimizer = optim.make(
        optim.Config(name, lr=0.1, freeze=("embedding", "blocks.*norm*", "blocks.qkv")), STEPS
    )
    frozen = {"embedding", "blocks.norm", "blocks.qkv"}
    params = eqx.tree_at(lambda m: m.embedding, model(values(0)), jnp.full((24, 8), -0.0))
    grads = eqx.tree_at(lambda m: m.embedding, model(values(1)), jnp.full((24, 8), jnp.nan))
    state = optimizer.init(params)
    after, state, stats = update(optimizer, grads, state, params, jnp.array(0))
    before, after = arrays(params), arrays(after)
    for n in before:
        same = before[n].tobytes() == after[n].tobytes()
        assert same is (n in frozen), n
        assert np.isfinite(after[n]).all(), n
    kept = arrays(grads)
    expected = np.sqrt(sum((kept[n] ** 2).sum() for n in kept if n not in frozen))
    np.testing.assert_allclose(stats["grad_norm"], expected, rtol=1e-6)
    assert not [n for n in arrays(state) if n.endswith(("embedding", "blocks.norm", "blocks.qkv"))]
    whole = optim.make(optim.Config(name), STEPS).init(params)
    assert len(jax.tree.leaves(whole)) > len(jax.tree.leaves(state))


def test_frozen_leaves_need_no_gradient():
    optimizer = optim.make(optim.Config(freeze=("embedding",)), STEPS)
    params, grads = model(values(0)), model(values(1))
    none = eqx.tree_at(lambda m: m.embedding, grads, None)
    state, step = optimizer.init(params), jnp.array(0)
    one, two = (update(optimizer, g, state, params, step) for g in (grads, none))
    assert eqx.tree_equal(one, two)


def test_freezing_what_is_not_there_names_what_is():
    with pytest.raises(
        UserError, match=r"block\.qkv names no parameter; there are embedding, .*qkv"
    ):
        optim.make(optim.Config(freeze=("block.qkv",)), STEPS).init(model(values(0)))
    with pytest.raises(UserError, match="nothing to train"):
        optim.make(optim.Config(freeze=("*",)), STEPS).init(model(values(0)))


@pytest.mark.parametrize(
    ("train", "freeze", "trained"),
    [
        (("embedding", "blocks.up*"), (), {"embedding", "blocks.up", "blocks.up_bias"}),
        (("blocks.*",), ("*_bias", "up", "qkv"), {"blocks.norm", "blocks.output"}),
        (("*norm",), ("blocks.norm",), {"norm"}),
        (("embedding,norm",), (), {"embedding", "norm", "blocks.norm"}),
    ],
)
def test_only_what_is_named_is_trained_less_what_is_frozen(train, freeze, trained):
    optimizer = optim.make(optim.Config(lr=0.1, train=train, freeze=freeze), STEPS)
    params = model(values(0))
    state = optimizer.init(params)
    after, _, _ = update(optimizer, model(values(1)), state, params, jnp.array(0))
    before, after = arrays(params), arrays(after)
    assert {name for name in before if before[name].tobytes() != after[name].tobytes()} == trained


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"train": ("heads",)}, "--optim.train heads names no parameter; there are embedding, "),
        ({"train": ("up",), "freeze": ("up", "qkv")}, "--optim.freeze up qkv leaves nothing to"),
    ],
)
def test_training_nothing_is_refused(flags, says):
    with pytest.raises(UserError, match=f"^{says}"):
        optim.make(optim.Config(**flags), STEPS).init(model(values(0)))


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("constant", {0: 0.25, 3: 1, 4: 1, 99: 1, 100: 1, 500: 1}),
        ("linear", {0: 0.25, 3: 1, 4: 1, 52: 0.55, 99: 0.1 + 0.9 / 96, 100: 0.1, 500: 0.1}),
        ("cosine", {0: 0.25, 3: 1, 4: 1, 52: 0.55, 28: 0.1 + 0.45 * (1 + 0.5**0.5), 500: 0.1}),
        ("wsd", {0: 0.25, 3: 1, 4: 1, 75: 1, 87: 1 - 0.9 * 12 / 25, 100: 0.1, 500: 0.1}),
    ],
)
def test_schedule_at_its_corners(schedule, points):
    config = optim.Config(lr=2.0, lr_end=0.2, warmup=4, schedule=schedule, wsd_decay=0.25)
    optimizer = optim.make(config, 100)
    rates = jax.vmap(optimizer.lr)(jnp.array(list(points), jnp.int32))
    np.testing.assert_allclose(rates, 2 * np.array(list(points.values())), rtol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak_and_with_only_warmup_ends_there():
    assert float(optim.make(optim.Config(lr=1.0, warmup=0), 5).lr(0)) == 1
    only = optim.make(optim.Config(lr=1.0, warmup=5), 5)
    assert float(only.lr(4)) == 1
    assert optim.make(optim.Config(), 1000).config.warmup == 50


def test_schedule_reads_the_step_it_is_given_and_an_equal_optimizer_compiles_once():
    traces = []

    @eqx.filter_jit
    def counted(optimizer, grads, state, params, step):
        traces.append(step)
        return optimizer.update(grads, state, params, step)

    config = optim.Config(
        "sgd", momentum=0.0, weight_decay=0.0, clip=0.0, lr=1.0, schedule="linear"
    )
    params, grads = model(values(0)), model(values(1))
    state = optim.make(config, STEPS).init(params)
    assert not jax.tree.leaves(state)
    moves = []
    for step in (0, 5):
        optimizer = optim.make(config, STEPS)
        after, _, stats = counted(optimizer, grads, state, params, jnp.array(step, jnp.int32))
        moves.append((params.norm - after.norm) / grads.norm)
        np.testing.assert_allclose(moves[-1], stats["lr"], rtol=1e-5)
    np.testing.assert_allclose(moves, np.array([[1.0] * 8, [0.5] * 8]), rtol=1e-5)
    assert len(traces) == 1


def moments(state):
    """Every tree of first moments in a state."""
    named = {"mu", "trace"}
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, Model))
    return [tree for path, tree in leaves if getattr(path[-1], "name", None) in named]


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_moments_lie_where_their_parameters_lie(name):
    mesh = sharding.make_mesh(1, 4, 2)
    params = model(values(0))
    shape = eqx.filter_eval_shape(optim.make(optim.Config(name), STEPS).init, params)
    placed = arrays_of_specs(sharding.specs(params, mesh))
    found = {}
    for tree in moments(shape):
        found |= arrays_of_specs(sharding.specs(tree, mesh))
    whole = arrays_of_specs(sharding.specs(shape, mesh))
    assert found == placed
    assert all(any(key.endswith(n) and whole[key] == placed[n] for key in whole) for n in placed)
    assert len(set(placed.values())) > 2


def arrays_of_specs(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.spec
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd", "muon"])
def test_a_step_over_eight_devices_equals_the_step_on_one(name):
    mesh = sharding.make_mesh(1, 4, 2)
    optimizer = optim.make(optim.Config(name, lr=0.1, warmup=0), STEPS)
    params, grads, step = model(values(0)), model(values(1)), jnp.array(0, jnp.int32)
    whole, _, _ = update(optimizer, grads, optimizer.init(params), params, step)
    placed, placed_grads = (sharding.shard(t, sharding.specs(t, mesh)) for t in (params, grads))
    state = optimizer.init(placed)
    state = sharding.shard(state, sharding.specs(state, mesh))
    split, _, _ = update(optimizer, placed_grads, state, placed, step)
    assert split.blocks.up.sharding.is_equivalent_to(placed.blocks.up.sharding, 3)
    for n, ours in arrays(split).items():
        np.testing.assert_allclose(ours, arrays(whole)[n], rtol=1e-5, atol=1e-6, err_msg=n)


@pytest.mark.parametrize(
    ("name", "beta"), [("adamw", 0.9), ("lion", 0.99), ("sgd", 0.95), ("muon", 0.95)]
)
def test_bfloat16_moments_are_rounded_once_and_only_in_storage(name, beta):
    config = optim.Config(name, moment_dtype="bfloat16", clip=0.0)
    _, state, _ = trained(config, 2)
    first, second = (np.float32(values(t)["blocks.up"]) for t in (1, 2))
    weight = 1 if name == "sgd" else np.float32(1 - beta)
    kept = jnp.asarray(weight * first).astype(jnp.bfloat16).astype(jnp.float32)
    kept = jnp.asarray(np.float32(beta) * np.asarray(kept) + weight * second)
    ours = next(tree for tree in moments(state) if isinstance(tree.blocks.up, jax.Array))
    assert ours.blocks.up.dtype == jnp.bfloat16
    # the two sides may order their float32 operations otherwise: a tie may fall to either side
    exact = np.asarray(ours.blocks.up == kept.astype(jnp.bfloat16))
    assert exact.mean() > 0.99
    if name == "adamw":
        assert {leaf.dtype for leaf in jax.tree.leaves(state[1].nu)} == {jnp.dtype("float32")}


def test_a_bfloat16_student_keeps_float32_moments():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model(values(0)))
    optimizer = optim.make(optim.Config(), STEPS)
    state = optimizer.init(params)
    after, state, _ = update(optimizer, params, state, params, jnp.array(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves((state[1].mu, state[1].nu))} == {jnp.dtype("float32")}


def per_layer(name, array):
    """The matrices [out, in] that muon is to make orthogonal."""
    if name == "blocks.qkv":
        return [array[i, :, j].reshape(8, 8) for i in range(3) for j in range(3)]
    return [array[i].reshape(array.shape[1], -1) for i in range(3)]


def test_muon_makes_each_matrix_of_each_layer_orthogonal():
    config = optim.Config("muon", lr=1.0, warmup=0, weight_decay=0.0, clip=0.0)
    after, _, _ = trained(config, 1)
    before, after, grads = arrays(model(values(0))), arrays(after), values(1)
    for name in MATRICES - {"embedding"}:
        moves = per_layer(name, before[name] - after[name])
        for move, grad in zip(moves, per_layer(name, grads[name]), strict=True):
            u, _, vt = np.linalg.svd(grad, full_matrices=False)
            # along the singular directions of the gradient, all of about one length
            lengths = u.T @ (move / (0.2 * max(move.shape) ** 0.5)) @ vt.T
            assert np.abs(lengths - np.diag(np.diag(lengths))).max() < 1e-4, name
            assert 0.6 < np.diag(lengths).min() < np.diag(lengths).max() < 1.3, name
    adam, _, _ = trained(optim.Config("adamw", lr=1.0, warmup=0, weight_decay=0.0, clip=0.0), 1)
    for name in SHAPES.keys() - (MATRICES - {"embedding"}):
        np.testing.assert_array_equal(after[name], arrays(adam)[name], err_msg=name)


class Wide(eqx.Module):
    up: Float[Array, "mlp embed"]
    bias: Float[Array, " mlp"]


def test_adafactor_factors_and_clips_each_layer_by_itself():
    rng = np.random.default_rng(0)
    ups = [s * rng.standard_normal((2, 160, 128)) ** 3 for s in (1, 5)]
    biases = [rng.standard_normal((2, 160)) for _ in range(2)]
    optimizer = optim.make(
        optim.Config(
            "adafactor", lr=1.0, warmup=0, schedule="constant", clip=0.0, weight_decay=0.0
        ),
        4,
    )
    params = Wide(jnp.zeros((2, 160, 128)), jnp.zeros((2, 160)))
    state = optimizer.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 0.1 * params.up.size
    row, col, full = np.zeros((2, 160)), np.zeros((2, 128)), np.zeros((2, 160))
    want_up, want_bias = np.zeros((2, 160, 128)), np.zeros((2, 160))
    for t, (up, bias) in enumerate(zip(ups, biases, strict=True)):
        grads = Wide(jnp.asarray(up, jnp.float32), jnp.asarray(bias, jnp.float32))
        params, state, _ = update(optimizer, grads, state, params, jnp.array(t))
        decay = 1 - (t + 1) ** -0.8
        row = decay * row + (1 - decay) * (up**2).mean(2)
        col = decay * col + (1 - decay) * (up**2).mean(1)
        full = decay * full + (1 - decay) * bias**2
        for i in range(2):
            second = np.outer(row[i], col[i]) / row[i].mean()
            move = up[i] / np.sqrt(second)
            want_up[i] -= move / max(1, np.sqrt((move**2).mean()))
            move = bias[i] / np.sqrt(full[i])
            want_bias[i] -= move / max(1, np.sqrt((move**2).mean()))
    np.testing.assert_allclose(params.up, want_up, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(params.bias, want_bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"lr": 0.0}, r"--optim\.lr "),
        ({"lr": float("nan")}, r"--optim\.lr "),
        ({"lr": 0.1, "lr_end": 0.2}, r"--optim\.lr-end"),
        ({"warmup": -1}, r"--optim\.warmup"),
        ({"wsd_decay": 0.0}, r"--optim\.wsd-decay"),
        ({"weight_decay": -0.1}, r"--optim\.weight-decay"),
        ({"clip": -1.0}, r"--optim\.clip"),
        ({"betas": (0.9, 1.0)}, r"--optim\.betas"),
        ({"eps": 0.0}, r"--optim\.eps"),
        ({"momentum": 1.0}, r"--optim\.momentum"),
        ({"name": "adafactor", "moment_dtype": "bfloat16"}, r"--optim\.moment-dtype"),
    ],
)
def test_nonsense_is_refused_by_the_name_of_its_flag(wrong, flag, monkeypatch):
    # as outside of the tests, where no hook checks the types first
    spec = importlib.util.spec_from_file_location("unchecked", optim.__file__)
    unchecked = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "unchecked", unchecked)
    spec.loader.exec_module(unchecked)
    with pytest.raises(UserError, match=flag):
        unchecked.Config(**wrong)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"--optim\.warmup is 11: .*--steps \(10\)"):
        optim.make(optim.Config(warmup=11), 10)


class Pair(eqx.Module):
    student: Model
    projection: Wide | None


@pytest.mark.parametrize(
    ("pattern", "frozen"),
    [
        ("embedding", {"student.embedding"}),
        ("student.norm", {"student.norm"}),
        ("blocks.*norm*", {"student.blocks.norm"}),
        ("projection.*", {"projection.up", "projection.bias"}),
    ],
)
def test_a_pattern_may_leave_out_the_first_part_of_a_path(pattern, frozen):
    params = Pair(model(values(0)), Wide(jnp.zeros((2, 16, 8)), jnp.zeros((2, 16))))
    trainable = optim.make(optim.Config(freeze=(pattern,)), STEPS).trainable(params)
    assert {name for name, leaf in arrays(trainable).items() if not leaf} == frozen


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd", "muon"])
def test_what_is_not_finite_changes_nothing(name):
    optimizer = optim.make(optim.Config(name), STEPS)
    params, grads = model(values(0)), model(values(1))
    state = optimizer.init(params)
    params, state, _ = update(optimizer, grads, state, params, jnp.array(0))
    broken = eqx.tree_at(lambda m: m.norm, grads, jnp.full(8, jnp.inf))
    after, following, stats = update(optimizer, broken, state, params, jnp.array(1))
    assert not stats["finite"] and eqx.tree_equal((after, following), (params, state))
    np.testing.assert_allclose(stats["lr"], optimizer.lr(1))
