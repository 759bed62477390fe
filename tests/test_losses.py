"""The losses against the same formulas, written densely in probability space and in float64."""

import contextlib
import re
from dataclasses import replace
from functools import partial
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import data
import losses
import sharding
from losses import DIVERGENCES, Config, Objective, TeacherStates
from losses.divergences import terms
from runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("strict")

NAMES = sorted(DIVERGENCES)
BATCH, SEQ, VOCAB, EMBED, TEACHER_EMBED = 3, 10, 40, 8, 12
MIXED = Config("jsd", 0.3, temperature=2.5, chunk=7)


def problem(seed=0, batch=BATCH, seq=SEQ, vocab=VOCAB, padding=(0, 0), dtype=jnp.float32):
    """student hidden, head, teacher states, labels, mask; `padding` rows on the two heads."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    return (
        normal(batch, seq, EMBED),
        normal(vocab + padding[0], EMBED, scale=0.5),
        TeacherStates(
            normal(batch, seq, TEACHER_EMBED),
            normal(vocab + padding[1], TEACHER_EMBED, scale=0.5),
        ),
        jnp.asarray(rng.integers(0, vocab, (batch, seq)), jnp.int32),
        jnp.asarray(rng.random((batch, seq)) < 0.7),
    )


def as_teacher(hidden, head, rows):
    """A teacher of TEACHER_EMBED and a head of `rows` with the logits of a student."""
    wider = (0, TEACHER_EMBED - EMBED)
    head = jnp.pad(head[:rows], [(0, max(0, rows - len(head))), wider])
    return TeacherStates(jnp.pad(hidden, [(0, 0), (0, 0), wider]), head)


def naive(config, p, q):
    """Per token, from probabilities."""

    def kl(a, b):
        return (a * (jnp.log(a) - jnp.log(b))).sum(-1)

    a, b, skew, share = config.ab_alpha, config.ab_beta, config.skew, config.beta
    match config.divergence:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            m = share * p + (1 - share) * q
            return share * kl(p, m) + (1 - share) * kl(q, m)
        case "skew_kl":
            return kl(p, skew * p + (1 - skew) * q)
        case "skew_reverse_kl":
            return kl(q, skew * q + (1 - skew) * p)
        case "tvd":
            return jnp.abs(p - q).sum(-1) / 2
        case "alpha_beta":
            mixed = a / (a + b) * p ** (a + b) + b / (a + b) * q ** (a + b)
            return -(p**a * q**b - mixed).sum(-1) / (a * b)


def dense(config, hidden, head, teacher, labels, mask, alpha, t):
    """Loss, (divergence, ce) and the gradients on hidden and head, all at once and in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = (hidden, head, teacher.hidden, teacher.head)
        hidden, head, teacher_hidden, teacher_head = (np.asarray(x, np.float64) for x in wide)
        width = min(len(head), len(teacher_head))
        z_teacher = teacher_hidden @ teacher_head[:width].T
        labels, mask = np.asarray(labels), np.asarray(mask)

        def f(hidden, head):
            z = jnp.einsum("bse,ve->bsv", hidden, head[:width])
            terms = naive(config, jax.nn.softmax(z_teacher / t), jax.nn.softmax(z / t))
            chosen = jnp.take_along_axis(jax.nn.softmax(z), labels[..., None], -1)[..., 0]
            divergence, ce = (mask * terms).sum(), -(mask * jnp.log(chosen)).sum()
            squared = t * t if config.temperature_squared else 1.0
            return alpha * squared * divergence + (1 - alpha) * ce, (divergence, ce)

        arrays = jnp.asarray(hidden), jnp.asarray(head)
        (total, parts), gradients = jax.value_and_grad(f, (0, 1), has_aux=True)(*arrays)
        return [np.asarray(x) for x in (total, *parts, *gradients)]


@partial(jax.jit, static_argnums=0)
def value_and_grads(objective, scale, step, arrays):
    def f(hidden, head, *rest):
        total, sums = losses.distill_loss(hidden, head, *rest, objective=objective, step=step)
        return scale * total, (total, sums)

    (_, (total, sums)), grads = jax.value_and_grad(f, (0, 1), has_aux=True)(*arrays)
    return [total, sums["divergence"], sums["ce"], *grads]


def chunked(config, *arrays, step=0, steps=1, scale=1.0):
    return value_and_grads(Objective(config, steps), jnp.float32(scale), step, arrays)


def relative(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30)


def assert_close(found, wanted, tolerance):
    errors = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) <= tolerance, errors


@pytest.mark.parametrize("name", NAMES)
def test_each_divergence(name):
    """One compiled program: equal to the dense computation, 0 where it must be, never NaN."""
    hidden, head, teacher, labels, mask = arrays = problem(padding=(6, 0))
    config = Config(name, temperature=2.5, chunk=7)
    found = chunked(config, *arrays)
    assert_close(found, dense(config, *arrays, 1.0, 2.5), 1e-5)
    assert not found[4][VOCAB:].any()  # padding rows
    # a student that is the teacher has nothing to learn
    same = as_teacher(hidden, head, VOCAB)
    total, divergence, ce, *gradients = chunked(config, hidden, head, same, labels, mask)
    assert abs(total) < 1e-4 and abs(divergence) < 1e-5 and ce > 1
    assert all(jnp.abs(g).max() < 1e-5 for g in gradients)
    # nothing counted is zero
    nothing = chunked(config, *arrays[:-1], jnp.zeros_like(mask))
    assert not any(jnp.any(x) for x in nothing)
    extreme = replace(teacher, hidden=teacher.hidden * -2.5e5)
    found = chunked(config, hidden * 2.5e5, head, extreme, labels, mask)
    assert all(jnp.isfinite(x).all() for x in found)


@pytest.mark.parametrize("t, chunk, padding", [(1.0, 64, (0, 5)), (2.5, 7, (0, 0))])
def test_with_a_share_of_the_cross_entropy(t, chunk, padding):
    hidden, head, teacher, labels, mask = arrays = problem(padding=padding)
    config = replace(MIXED, temperature=t, chunk=chunk)
    assert_close(chunked(config, *arrays), dense(config, *arrays, 0.3, t), 1e-5)
    assert not any(jnp.any(x) for x in chunked(config, *arrays[:-1], jnp.zeros_like(mask)))
    extreme = replace(teacher, hidden=teacher.hidden * -1e5)
    found = chunked(config, hidden * 1e5, head, extreme, labels, mask)
    assert all(jnp.isfinite(x).all() for x in found)


@settings(max_examples=4, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 99),
    chunk=st.sampled_from([1, 4, 12, 1000]),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    t=st.sampled_from([0.5, 1.0, 4.0]),
    squared=st.booleans(),
    share=st.floats(0.05, 0.95),
    exponents=st.tuples(st.floats(0.1, 1.5), st.floats(0.1, 1.5)),
)
def test_equals_the_dense_computation_anywhere(
    name, seed, chunk, alpha, t, squared, share, exponents
):
    arrays = problem(seed, batch=2, seq=7)
    config = Config(name, alpha, temperature=t, chunk=chunk, temperature_squared=squared)
    a, b = exponents
    config = replace(config, beta=share, skew=share, ab_alpha=a, ab_beta=b)
    assert_close(chunked(config, *arrays), dense(config, *arrays, alpha, t), 2e-5)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "alpha_beta"])
def test_half_precision_differs_by_its_rounding(name):
    # logits and softmax are float32; the gradient on them is rounded to 8 bits before the products
    arrays = problem(dtype=jnp.bfloat16)
    config = Config(name, 0.5, temperature=2.0, chunk=8)
    found, wanted = chunked(config, *arrays), dense(config, *arrays, 0.5, 2.0)
    assert_close(found[:3], wanted[:3], 1e-5)
    assert_close(found[3:], wanted[3:], 1e-2)
    assert found[3].dtype == found[4].dtype == jnp.bfloat16


def test_half_precision_stops_at_the_products():
    # XLA on CPU computes in float32 whatever it is told, so what it is told is read
    arrays = problem(dtype=jnp.bfloat16)
    told = str(jax.make_jaxpr(gradient(Objective(Config("jsd", 0.5, chunk=8))))(*arrays))
    found = set(re.findall(r":bf16\[[\d,]*\] = (\w+)", told))
    moved = {"convert_element_type", "dynamic_slice", "dynamic_update_slice", "pad", "reshape"}
    moved |= {"slice", "squeeze", "transpose", "copy", "select_n", "broadcast_in_dim"}
    assert found <= moved | {"jit", "scan"}, found
    assert {"exp", "dot_general"} <= set(re.findall(r":f32\[[\d,]*\] = (\w+)", told))


def test_float32_master_head_with_half_precision_states():
    hidden, head, *rest = problem()
    hidden, rounded = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    config = Config(alpha=0.5, chunk=8)
    found = chunked(config, hidden, head, *rest)
    assert found[3].dtype == jnp.bfloat16 and found[4].dtype == jnp.float32
    wanted = dense(config, hidden, rounded, *rest, 0.5, 1.0)
    assert_close(found[:3], wanted[:3], 1e-5)
    assert_close(found[3:], wanted[3:], 1e-2)


def test_chunks_padding_and_microbatches_change_nothing():
    arrays = problem()
    whole = chunked(MIXED, *arrays)
    for chunk in (1, 1000):
        assert_close(chunked(replace(MIXED, chunk=chunk), *arrays), whole, 1e-6)

    def of_rows(change):
        hidden, head, teacher, labels, mask = arrays
        teacher = replace(teacher, hidden=change(teacher.hidden))
        return change(hidden), head, teacher, change(labels), change(mask)

    parts = [chunked(MIXED, *of_rows(lambda x, i=i: x[i : i + 1])) for i in range(BATCH)]
    sums = [sum(values) for values in zip(*parts, strict=True)]
    sums[3] = jnp.concatenate([part[3] for part in parts])
    assert_close(sums, whole, 1e-6)

    longer = of_rows(lambda x: jnp.pad(x, [(0, 0), (0, 5), (0, 0)][: x.ndim]))
    found = chunked(MIXED, *longer)
    found[3] = found[3][:, :SEQ]
    assert_close(found, whole, 1e-6)


def test_the_mask_is_that_of_the_label_at_its_own_place():
    *arrays, labels, mask = problem()
    config, here = MIXED, (1, 4)
    one = jnp.zeros_like(mask).at[here].set(True)
    total, _, _, d_hidden, _ = chunked(config, *arrays, labels, one)
    touched = np.abs(np.asarray(d_hidden)).sum(-1) > 0
    assert touched[here] and touched.sum() == 1
    other = labels.at[1, 3].add(1).at[1, 5].add(1) % VOCAB
    assert chunked(config, *arrays, other, one)[0] == total
    assert chunked(config, *arrays, labels.at[here].add(1) % VOCAB, one)[0] != total


def test_the_gradient_follows_what_is_made_of_the_loss():
    arrays = problem()
    plain, scaled = chunked(MIXED, *arrays), chunked(MIXED, *arrays, scale=0.3)
    assert_close(scaled[3:], [0.3 * np.asarray(g) for g in plain[3:]], 1e-6)


def test_the_teacher_is_not_differentiated():
    student_hidden, student_head, teacher, labels, mask = problem()
    objective = Objective(Config(alpha=0.5))

    def f(teacher):
        arrays = (student_hidden, student_head, teacher, labels, mask)
        return losses.distill_loss(*arrays, objective=objective, step=0)[0]

    assert all(not g.any() for g in jax.tree.leaves(jax.grad(f)(teacher)))


def test_without_a_teacher_the_loss_is_the_cross_entropy():
    hidden, head, _, labels, mask = arrays = problem()
    config = Config(chunk=8)
    total, divergence, ce, *gradients = chunked(config, hidden, head, None, labels, mask)
    wanted = dense(config, *arrays, 0.0, 1.0)
    assert total == ce and divergence == 0
    assert_close([total, ce, *gradients], [wanted[0], *wanted[2:]], 1e-5)


def flops(config, *arrays, differentiate=True):
    objective = Objective(config)

    def f(hidden, head, *rest):
        return losses.distill_loss(hidden, head, *rest, objective=objective, step=0)

    if differentiate:
        f = jax.value_and_grad(f, (0, 1), has_aux=True)
    return jax.jit(f).lower(*arrays).compile().cost_analysis()["flops"]


def test_only_what_is_asked_for_is_computed():
    # one chunk, which XLA counts whole
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((1, 96, 64)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((4096, 64)), jnp.float32)
    labels, mask = jnp.zeros((1, 96), jnp.int32), jnp.ones((1, 96), bool)
    arrays = hidden, head, TeacherStates(hidden, head), labels, mask
    product = 2 * 96 * 64 * 4096
    config = Config(chunk=96)
    full, value = flops(config, *arrays), flops(config, *arrays, differentiate=False)
    assert 2 <= value / product < 3 and 4 <= full / product < 5
    alone = flops(config, hidden, head, None, labels, mask)
    assert 3 <= alone / product < 4
    mixed = flops(replace(config, alpha=0.5), *arrays)
    assert full < mixed  # at alpha 1 the cross entropy is only reported


# Elementwise terms


@pytest.mark.parametrize("name", NAMES)
def test_g_is_the_derivative_of_f(name):
    with jax.enable_x64(True):
        log_p, log_q = jnp.asarray(np.random.default_rng(0).uniform(-20, 0, (2, 50)))
        exponents = [(0.2, 0.7), (1.3, -0.4), (0.0, 0.6)]
        for a, b in exponents if name == "alpha_beta" else exponents[:1]:
            of = partial(terms, Config(name, ab_alpha=a, ab_beta=b))
            wanted = (of(log_p, log_q + 1e-6)[0] - of(log_p, log_q - 1e-6)[0]) / 2e-6
            assert_close([of(log_p, log_q)[1]], [wanted], 1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.9])
def test_terms_are_finite_where_probability_is_not(name, share):
    ends = np.float32([-np.inf, -1e30, -1e4, -90, -1e-7, 0])
    log_p, log_q = (jnp.asarray(x.ravel()) for x in np.meshgrid(ends, ends))
    config = Config(name, beta=share or 0.5, skew=share, ab_alpha=share, ab_beta=0.5)
    f, g = terms(config, log_p, log_q)
    assert jnp.isfinite(f).all() and jnp.isfinite(g).all() and (f > -1e-6).all()
    same = log_p == log_q
    assert jnp.abs(f[same]).max() < 1e-6 and jnp.abs(g[same]).max() < 1e-6
    # an entry that neither can take, an empty tail say, adds nothing
    empty = jnp.float32([-jnp.inf])
    assert terms(config, empty, empty) == (0.0, 0.0)


def value(config, log_p, log_q):
    return terms(config, log_p, log_q)[0].sum(-1)


def distributions(seed=0, entries=200, scale=3.0):
    z = np.random.default_rng(seed).standard_normal((2, 6, entries)) * scale
    return jax.nn.log_softmax(jnp.asarray(z, jnp.float32))


def test_alpha_beta_has_its_limits():
    log_p, log_q = distributions()
    p, q = np.exp(np.float64([log_p, log_q]))
    d = np.log(p) - np.log(q)
    a = 0.6
    limits = {
        (1, 0): (p * d).sum(-1),
        (0, 1): -(q * d).sum(-1),
        (0, 0): (d**2).sum(-1) / 2,
        (a, 0): (p**a * a * d - p**a + q**a).sum(-1) / a**2,
        (0, a): (-(q**a) * a * d - q**a + p**a).sum(-1) / a**2,
        (a, -a): (np.exp(a * d) - a * d - 1).sum(-1) / a**2,
    }
    for (a, b), wanted in limits.items():
        at = Config("alpha_beta", ab_alpha=float(a), ab_beta=float(b))
        assert_close([value(at, log_p, log_q)], [wanted], 2e-5)
        for tiny in (1e-4, 1e-8):
            for da, db in ((tiny, 0.0), (0.0, tiny), (-tiny, tiny), (tiny, tiny)):
                near = Config("alpha_beta", ab_alpha=a + da, ab_beta=b + db)
                assert_close([value(near, log_p, log_q)], [wanted], 2e-5 + 100 * tiny)


def test_alpha_beta_is_accurate_where_teacher_and_student_are_close():
    log_p, log_q = distributions()
    log_q = jax.nn.log_softmax(log_p + jnp.tanh(log_q) * 0.1)
    for a, b in ((0.2, 0.7), (1.0, 1.0), (0.5, 0.5), (2.0, -0.5)):
        config = Config("alpha_beta", ab_alpha=a, ab_beta=b)
        with jax.enable_x64(True):
            p, q = (jnp.exp(jnp.asarray(x, jnp.float64)) for x in (log_p, log_q))
            wanted = naive(config, p, q)
        assert_close([value(config, log_p, log_q)], [wanted], 1e-5)


def test_skews_and_jsd_lead_to_the_kl_they_are_named_after():
    log_p, log_q = distributions()
    forward = value(Config("forward_kl"), log_p, log_q)
    reverse = value(Config("reverse_kl"), log_p, log_q)
    assert_close([value(Config("skew_kl", skew=0.0), log_p, log_q)], [forward], 1e-6)
    assert_close([value(Config("skew_reverse_kl", skew=0.0), log_p, log_q)], [reverse], 1e-6)
    log_p, log_q = distributions(scale=0.3)
    forward = value(Config("forward_kl"), log_p, log_q)
    reverse = value(Config("reverse_kl"), log_p, log_q)
    low = value(Config("jsd", beta=0.01), log_p, log_q) / 0.01
    high = value(Config("jsd", beta=0.99), log_p, log_q) / 0.01
    assert_close([low, high], [forward, reverse], 0.03)
    tvd = value(Config("tvd"), log_p, log_q)
    assert (tvd >= 0).all() and (tvd <= 1).all()


# Schedules and flags


@pytest.mark.parametrize("schedule, quarter", [("linear", 0.25), ("cosine", (1 - 0.5**0.5) / 2)])
def test_schedules(schedule, quarter):
    config = Config(
        alpha=0.8,
        alpha_end=0.2,
        alpha_schedule=schedule,
        temperature=4.0,
        temperature_end=1.0,
        temperature_schedule=schedule,
    )
    objective = Objective(config, 100)
    for step, progress in ((0, 0), (25, quarter), (50, 0.5), (100, 1), (150, 1)):
        for at in (step, jnp.asarray(step)):
            np.testing.assert_allclose(objective.at("alpha", at), 0.8 - 0.6 * progress, rtol=1e-6)
            np.testing.assert_allclose(objective.at("temperature", at), 4 - 3 * progress, rtol=1e-6)
    if schedule == "linear":
        arrays = problem()
        found = chunked(config, *arrays, step=jnp.asarray(50), steps=100)
        assert_close(found, dense(config, *arrays, 0.5, 2.5), 1e-5)


def test_an_objective_is_static():
    made = [Objective(Config("jsd", alpha=0.5), 10, "bfloat16", "full", 4) for _ in range(2)]
    assert made[0] == made[1] and hash(made[0]) == hash(made[1])
    for name in ("alpha", "temperature", "feature_weight"):
        assert isinstance(made[0].at(name, 3), float)
    assert not jax.tree.leaves(eqx.filter(made[0], eqx.is_array))


def test_temperature_squared_keeps_gradients_comparable():
    arrays = problem(padding=(6, 0))
    squared = Config(temperature=2.5, chunk=7)
    plain = replace(squared, temperature_squared=False)
    a, b = chunked(plain, *arrays), chunked(squared, *arrays)
    assert_close([b[0], *b[3:]], [6.25 * np.asarray(x) for x in (a[0], *a[3:])], 1e-6)
    assert a[1] == b[1]  # what is reported is unweighted


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"alpha": 1.5}, ["--loss.alpha ", "1.5"]),
        ({"alpha": float("nan")}, ["--loss.alpha "]),
        ({"alpha_end": -0.1, "alpha_schedule": "linear"}, ["--loss.alpha-end", "-0.1"]),
        ({"alpha_end": 0.1}, ["--loss.alpha-schedule", "linear"]),
        ({"alpha_schedule": "cosine"}, ["--loss.alpha-schedule", "--loss.alpha-end"]),
        ({"temperature": 0.0}, ["--loss.temperature "]),
        ({"temperature_end": 0.0, "temperature_schedule": "linear"}, ["--loss.temperature-end"]),
        ({"temperature_schedule": "linear"}, ["--loss.temperature-schedule"]),
        ({"beta": 0.0}, ["--loss.beta", "forward_kl", "reverse_kl"]),
        ({"beta": 1.0}, ["--loss.beta", "forward_kl", "reverse_kl"]),
        ({"skew": 1.0}, ["--loss.skew"]),
        ({"ab_alpha": float("inf")}, ["--loss.ab-alpha"]),
        ({"chunk": 0}, ["--loss.chunk"]),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, words):
    with pytest.raises(UserError) as refusal:
        Config(**flags)
    text = str(refusal.value) + " "
    assert "\n" not in text and all(word in text for word in words), text


def test_every_divergence_has_its_flag_value():
    assert get_args(losses.Divergence) == tuple(DIVERGENCES)


# Evaluation


@partial(jax.jit, static_argnames="chunk")
def measured_sums(hidden, head, signal, labels, mask, *, chunk):
    figures = losses.measure(hidden, head, signal, labels, chunk=chunk) | {"tokens": mask}
    return {name: jnp.sum(x, where=mask, dtype=jnp.float32) for name, x in figures.items()}


@pytest.mark.parametrize("chunk, padding", [(4, (0, 3)), (1000, (2, 0))])
def test_measure(chunk, padding):
    hidden, head, teacher, labels, mask = arrays = problem(padding=padding)
    measure = partial(measured_sums, chunk=chunk)
    found = measure(*arrays)
    z, z_teacher = hidden @ head[:VOCAB].T, teacher.hidden @ teacher.head[:VOCAB].T
    swapped = (teacher.hidden, teacher.head, TeacherStates(hidden, head), labels, mask)
    same = np.asarray(z.argmax(-1) == z_teacher.argmax(-1))
    wanted = {
        "tokens": mask.sum(),
        "ce": dense(Config(), *arrays, 0.0, 1.0)[2],
        "teacher_ce": dense(Config(), *swapped, 0.0, 1.0)[2],
        "kl": dense(Config("forward_kl"), *arrays, 1.0, 1.0)[1],
        "reverse_kl": dense(Config("reverse_kl"), *arrays, 1.0, 1.0)[1],
        "agreement": (same & np.asarray(mask)).sum(),
    }
    assert found.keys() == wanted.keys()
    assert_close([found[name] for name in wanted], wanted.values(), 1e-5)
    alone = measure(hidden, head[:VOCAB], None, labels, mask)
    assert alone.keys() == {"tokens", "ce"}
    assert_close([alone["ce"]], [wanted["ce"]], 1e-5)
    same = measure(hidden, head, as_teacher(hidden, head, len(teacher.head)), labels, mask)
    assert float(same["agreement"]) == float(same["tokens"]) == int(mask.sum())
    assert same["ce"] == pytest.approx(float(same["teacher_ce"])) and abs(same["kl"]) < 1e-5


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_the_likeliest_successors(mesh):
    hidden, head, teacher, labels, _ = problem(batch=8, vocab=64)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(sharding.make_mesh(*mesh)):
        figures = jax.jit(partial(losses.measure, top=5, chunk=16))(hidden, head, teacher, labels)
    for whose, z in (("", hidden @ head.T), ("teacher_", teacher.hidden @ teacher.head.T)):
        log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(z), 5)
        np.testing.assert_array_equal(figures[f"{whose}ids"], ids)
        assert_close([figures[f"{whose}log_probs"]], [log_probs], 1e-5)


# Memory and placement


def gradient(objective):
    def f(hidden, head, *rest):
        return losses.distill_loss(hidden, head, *rest, objective=objective, step=0)

    return jax.value_and_grad(f, (0, 1), has_aux=True)


def zeros(seq, vocab, embed, dtype):
    hidden, head = jnp.zeros((1, seq, embed), dtype), jnp.zeros((vocab, embed), dtype)
    labels, mask = jnp.zeros((1, seq), jnp.int32), jnp.zeros((1, seq), bool)
    return hidden, head, TeacherStates(hidden, head), labels, mask


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temporaries_do_not_grow_with_the_sequence(dtype):
    vocab, embed = 32768, 64

    def temporaries(seq):
        arrays = jax.eval_shape(lambda: zeros(seq, vocab, embed, dtype))
        step = gradient(Objective(Config("jsd", 0.5, temperature=2.0, chunk=512)))
        compiled = sharding.compiled(jax.jit(step).lower(*arrays))
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048), temporaries(8192)
    assert long < 1.2 * short
    assert short < 10 * 4 * 512 * vocab  # some chunks of logits and a head, never all logits


def placed(mesh, arrays):
    batch, vocab = (NamedSharding(mesh, P(axes)) for axes in (("data", "fsdp"), ("fsdp", "tensor")))
    places = jax.tree.map(lambda _: batch, arrays[2])
    if isinstance(arrays[2], TeacherStates):
        places = sharding.specs(arrays[2], mesh)
        assert places.hidden.is_equivalent_to(batch, 3) and places.head.is_equivalent_to(vocab, 2)
    return jax.device_put(arrays, (batch, vocab, places, batch, batch))


def assert_gathered_is_smaller(program, size):
    """Hidden chunks, labels, masks are gathered, nothing as wide as a part of the vocabulary."""
    for line in program.as_text().splitlines():
        kind = re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line)
        if kind:
            shapes = re.findall(r"\w+\[([\d,]+)\]", line[: kind.start()])
            sizes = [int(size) for shape in shapes for size in shape.split(",")]
            assert sizes and max(sizes) < size, line


def test_a_mesh_changes_nothing_and_gathers_no_vocabulary():
    vocab, batch, seq, chunk = 4096, 8, 12, 32
    arrays = problem(batch=batch, seq=seq, vocab=vocab)
    step = gradient(Objective(Config("jsd", 0.5, temperature=2.0, chunk=chunk)))
    (wanted, sums), gradients = jax.jit(step)(*arrays)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(*placed(mesh, arrays)).compile()
        (found, found_sums), (d_hidden, d_head) = compiled(*placed(mesh, arrays))
        evaluation = measured_sums.lower(*placed(mesh, arrays), chunk=chunk).compile()
        measured = evaluation(*placed(mesh, arrays))
    assert_close([found, *found_sums.values()], [wanted, *sums.values()], 1e-5)
    assert_close([d_hidden, d_head], gradients, 1e-5)
    alone = measured_sums(*arrays, chunk=chunk)
    assert_close(measured.values(), alone.values(), 1e-5)
    assert d_head.sharding.shard_shape(d_head.shape) == (vocab // 4, EMBED)
    assert d_hidden.sharding.shard_shape(d_hidden.shape) == (batch // 4, seq, EMBED)

    for program in (compiled, evaluation):
        assert_gathered_is_smaller(program, vocab // 4)
    text = compiled.as_text()
    # each slice of data adds up its own head gradient: one reduction, outside the loop
    reductions = [
        line for line in text.splitlines() if f"[{vocab // 4},{EMBED}]" in line.split("(")[0]
    ]
    reductions = [line for line in reductions if re.search(r" all-reduce(-start)?\(", line)]
    assert len(reductions) == 1 and "while" not in reductions[0].split("op_name=")[1]


def test_a_mesh_with_padding_rows_and_an_odd_batch():
    arrays = problem(batch=3, seq=5, vocab=64, padding=(0, 8))
    step = gradient(Objective(Config("reverse_kl", 0.5, chunk=7)))
    (wanted, _), gradients = jax.jit(step)(*arrays)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        (found, _), found_gradients = jax.jit(step)(*arrays)
    assert_close([found, *found_gradients], [wanted, *gradients], 1e-5)


# Targets


@partial(jax.jit, static_argnums=(1, 2, 3))
def top_k_of(teacher, count, t, chunk=8):
    return losses.top_k(teacher, count=count, temperature=t, chunk=chunk)


@partial(jax.jit, static_argnums=(2, 3, 4))
def sample_of(teacher, key, count, t=1.0, chunk=8, windows=None):
    windows = jnp.arange(len(teacher.hidden)) if windows is None else windows
    settings = {"count": count, "temperature": t, "chunk": chunk}
    return losses.sample_targets(teacher, windows, key, **settings)


def from_targets(config, arrays, targets):
    hidden, head, _, labels, mask = arrays
    return chunked(config, hidden, head, targets, labels, mask)


def coarse(config, arrays, targets, t):
    """As `dense`, with teacher and student summed up over all but the entries."""
    hidden, head, teacher, labels, mask = arrays
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = (hidden, head, teacher.hidden, teacher.head)
        hidden, head, teacher_hidden, teacher_head = (np.asarray(x, np.float64) for x in wide)
        labels, mask, ids = np.asarray(labels), np.asarray(mask), np.asarray(targets.ids)
        inside = np.zeros((*ids.shape[:2], len(head)))
        np.put_along_axis(inside, ids, 1.0, -1)

        def bucketed(z):
            p = jax.nn.softmax(z / t)
            rest = (p * (1 - inside)).sum(-1, keepdims=True)
            return jnp.concatenate([jnp.take_along_axis(p, ids, -1), rest], -1)

        p = bucketed(teacher_hidden @ teacher_head.T)

        def f(hidden, head):
            z = jnp.einsum("bse,ve->bsv", hidden, head)
            chosen = jnp.take_along_axis(jax.nn.softmax(z), labels[..., None], -1)[..., 0]
            divergence = (mask * naive(config, p, bucketed(z))).sum()
            ce = -(mask * jnp.log(chosen)).sum()
            return config.alpha * t * t * divergence + (1 - config.alpha) * ce, (divergence, ce)

        arrays = jnp.asarray(hidden), jnp.asarray(head)
        (total, parts), gradients = jax.value_and_grad(f, (0, 1), has_aux=True)(*arrays)
        return [np.asarray(x) for x in (total, *parts, *gradients)]


@pytest.mark.parametrize("name", NAMES)
def test_top_k_targets_are_entries_and_one_bucket(name):
    hidden, head, teacher, labels, mask = arrays = problem()
    config, targets = replace(MIXED, divergence=name), top_k_of(teacher, 9, 2.5)
    assert_close(from_targets(config, arrays, targets), coarse(config, arrays, targets, 2.5), 1e-5)
    nothing = from_targets(config, (*arrays[:-1], jnp.zeros_like(mask)), targets)
    assert not any(jnp.any(x) for x in nothing)
    targets = top_k_of(replace(teacher, hidden=teacher.hidden * -2.5e5), 9, 2.5)
    found = from_targets(config, (hidden * 2.5e5, *arrays[1:]), targets)
    assert all(jnp.isfinite(x).all() for x in found)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_with_all_entries_nothing_is_lost(name):
    hidden, _, teacher, *_ = arrays = problem()
    config, targets = replace(MIXED, divergence=name), top_k_of(teacher, VOCAB, 2.5)
    assert jnp.isneginf(targets.rest).all()
    assert_close(from_targets(config, arrays, targets), chunked(config, *arrays), 1e-5)
    targets = top_k_of(replace(teacher, hidden=teacher.hidden * -2.5e5), VOCAB, 2.5)
    found = from_targets(config, (hidden * 2.5e5, *arrays[1:]), targets)
    assert all(jnp.isfinite(x).all() for x in found)


def test_the_likeliest_and_the_mass_of_the_rest():
    teacher = problem(padding=(0, 5))[2]
    hidden, head = teacher.hidden.at[0, 0].set(0), teacher.head  # all are as likely there
    for scale in (1.0, 40.0):
        targets = top_k_of(TeacherStates(scale * hidden, head), 6, 2.0)
        with jax.enable_x64(True):
            z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T * scale / 2
            log_p = np.asarray(jax.nn.log_softmax(z))
        order = np.argsort(-log_p, axis=-1, kind="stable")
        np.testing.assert_array_equal(targets.ids, order[..., :6])
        tops, others = (np.take_along_axis(log_p, i, -1) for i in (order[..., :6], order[..., 6:]))
        np.testing.assert_allclose(targets.log_probs, tops, atol=1e-5 * scale)
        rest = np.logaddexp.reduce(others, -1)
        np.testing.assert_allclose(targets.rest, rest, atol=1e-5 * scale)
    assert targets.rest.min() < -30  # the least is as exact as the largest


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_a_student_sure_of_the_entries_has_an_exact_tail(name):
    _, head, teacher, *rest = problem()
    config, targets = replace(MIXED, divergence=name), top_k_of(teacher, 9, 2.5)
    best = head[targets.ids[..., 0]]
    sure = best * (100 / (best**2).sum(-1, keepdims=True))
    arrays = (sure, head, teacher, *rest)
    assert_close(from_targets(config, arrays, targets), coarse(config, arrays, targets, 2.5), 1e-5)


def test_targets_measure_less_than_all():
    arrays = problem()
    config = replace(MIXED, divergence="forward_kl")
    kl = [from_targets(config, arrays, top_k_of(arrays[2], k, 2.5))[1] for k in (1, 9, VOCAB)]
    assert kl[0] < kl[1] < kl[2]


def test_draws_are_unbiased_and_converge_as_they_should():
    """The error of a mean over n samples falls as 1/sqrt(n), down to that of all of them."""
    hidden, head, teacher, labels, mask = problem(batch=2, seq=5)
    teacher = replace(teacher, hidden=teacher.hidden * 0.7)
    arrays = (hidden, head, teacher, labels, jnp.ones_like(mask))
    config, total = Config(temperature=1.5, chunk=16), 4096
    wanted = dense(config, *arrays, 1.0, 1.5)

    def once(key):
        return from_targets(config, arrays, sample_of(teacher, key, 8, 1.5, 16))

    keys = jax.random.split(jax.random.key(0), total)
    samples = jax.jit(lambda keys: jax.lax.map(once, keys, batch_size=256))(keys)
    for i in (0, 3, 4):  # loss, gradients
        found = np.asarray(samples[i], np.float64).reshape(total, -1)
        errors = {}
        for n in (1, 4, 16, 64, 256, total):
            means = found.reshape(total // n, n, -1).mean(1)
            errors[n] = np.sqrt(np.mean((means - wanted[i].reshape(-1)) ** 2))
        spread = np.sqrt(found.var(0).mean())
        for n in (1, 4, 16, 64, 256):
            assert errors[n] == pytest.approx(spread / n**0.5, rel=0.25), (i, errors)
        assert errors[total] < 2.5 * spread / total**0.5, (i, errors)


def test_draws_are_distinct_and_depend_on_their_window_alone():
    teacher = problem(batch=4, seq=12)[2]
    key = jax.random.key(5)
    ids = sample_of(teacher, key, 10, 1.0, 8, jnp.arange(4)).ids
    assert (np.diff(np.sort(ids, -1), axis=-1) > 0).all()
    np.testing.assert_array_equal(sample_of(teacher, key, 10, 1.0, 1000).ids, ids)
    order = jnp.array([2, 0, 3, 1])
    moved = replace(teacher, hidden=teacher.hidden[order])
    found = sample_of(moved, key, 10, 1.0, 8, order).ids
    np.testing.assert_array_equal(found, ids[order])
    other = sample_of(moved, key, 10, 1.0, 8, order.at[0].set(7)).ids
    np.testing.assert_array_equal(other[1:], found[1:])
    assert (other[0] != found[0]).any()


def test_a_mesh_changes_no_targets_and_gathers_no_vocabulary():
    vocab, batch, seq, chunk = 512, 8, 12, 32
    hidden, head, teacher, *rest = problem(batch=batch, seq=seq, vocab=vocab)
    key = jax.random.key(0)
    makes = [
        lambda teacher: top_k_of(teacher, 7, 1.3, chunk),
        lambda teacher: sample_of(teacher, key, 9, 1.3, chunk),
    ]
    step = gradient(Objective(Config(alpha=0.5, temperature=1.3, chunk=chunk)))
    mesh = sharding.make_mesh(2, 2, 2)
    for make in makes:
        targets = jax.jit(make)(teacher)
        arrays = (hidden, head, targets, *rest)
        (wanted, _), gradients = jax.jit(step)(*arrays)
        with jax.set_mesh(mesh):
            there = placed(mesh, (hidden, head, teacher, *rest))
            making = jax.jit(make).lower(there[2]).compile()
            split = making(there[2])
            arrays = placed(mesh, (hidden, head, split, *rest))
            training = jax.jit(step).lower(*arrays).compile()
            (found, _), found_gradients = training(*arrays)
        assert type(split) is type(targets)
        np.testing.assert_array_equal(split.ids, targets.ids)
        assert_close(split[1:], targets[1:], 1e-5)
        assert split.ids.sharding.shard_shape(split.ids.shape)[0] == batch // 4
        assert_close([found, *found_gradients], [wanted, *gradients], 1e-5)
        for program in (making, training):
            assert_gathered_is_smaller(program, vocab // 4)


# Signals


def test_what_of_a_batch_has_rows():
    teacher, labels, mask = problem()[2:]
    batch = data.Batch(labels, labels, mask, teacher)
    rows, rest = losses.partition_rows(batch)
    assert rows.signal.head is None and all(len(x) == BATCH for x in jax.tree.leaves(rows))
    assert [x is teacher.head for x in jax.tree.leaves(rest)] == [True]
    assert eqx.tree_equal(eqx.combine(rows, rest), batch)
    for signal in (None, top_k_of(teacher, 3, 1.0)):
        rows, rest = losses.partition_rows(batch._replace(signal=signal))
        assert not jax.tree.leaves(rest) and eqx.tree_equal(rows.signal, signal)


def test_shapes_of_targets():
    teacher, key = problem()[2], jax.random.key(0)
    for kind, make in (
        (losses.TopK, lambda: top_k_of(teacher, 4, 1.0)),
        (losses.SampledTargets, lambda: sample_of(teacher, key, 4)),
    ):
        assert jax.eval_shape(make) == kind.abstract(BATCH, SEQ, 4)
