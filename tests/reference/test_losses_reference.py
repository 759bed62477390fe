"""The losses against torch's, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from losses import Config, Objective, TeacherStates

pytestmark = pytest.mark.usefixtures("strict")


def torch_divergence(name, log_p, log_q, config):
    # of its second argument from the first
    kl = partial(F.kl_div, reduction="none", log_target=True)
    p, q = log_p.exp(), log_q.exp()
    mixture = {
        "jsd": lambda: config.beta * p + (1 - config.beta) * q,
        "skew_kl": lambda: config.skew * p + (1 - config.skew) * q,
        "skew_reverse_kl": lambda: config.skew * q + (1 - config.skew) * p,
    }
    m = mixture[name]().log() if name in mixture else None
    return {
        "forward_kl": lambda: kl(log_q, log_p),
        "reverse_kl": lambda: kl(log_p, log_q),
        "jsd": lambda: config.beta * kl(m, log_p) + (1 - config.beta) * kl(m, log_q),
        "skew_kl": lambda: kl(m, log_p),
        "skew_reverse_kl": lambda: kl(m, log_q),
        "tvd": lambda: F.l1_loss(q, p, reduction="none") / 2,
    }[name]().sum(-1)


@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
)
@pytest.mark.parametrize("alpha, t", [(1.0, 1.0), (0.4, 2.0)])
def test_loss_and_gradient(name, alpha, t):
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((3, 7, 8)), rng.standard_normal((50, 8)) / 2
    teacher_hidden, teacher_head = rng.standard_normal((3, 7, 9)), rng.standard_normal((50, 9)) / 2
    labels, mask = rng.integers(0, 50, (3, 7)), rng.random((3, 7)) < 0.7
    config = Config(name, alpha, temperature=t, beta=0.3, chunk=6)

    x, w = (torch.tensor(a, requires_grad=True) for a in (hidden, head))
    z, z_teacher = x @ w.T, torch.tensor(teacher_hidden @ teacher_head.T)
    log_p, log_q = F.log_softmax(z_teacher / t, -1), F.log_softmax(z / t, -1)
    divergence = torch_divergence(name, log_p, log_q, config)
    # -100 is torch's label of a token that does not count
    counted = torch.tensor(np.where(mask, labels, -100))
    ce = F.cross_entropy(z.flatten(0, 1), counted.flatten(), reduction="sum")
    divergence = divergence[torch.tensor(mask)].sum()
    total = alpha * t**2 * divergence + (1 - alpha) * ce
    total.backward()

    arrays = [jnp.asarray(a, jnp.float32) for a in (hidden, head, teacher_hidden, teacher_head)]
    arrays = *arrays[:2], TeacherStates(*arrays[2:]), jnp.asarray(labels, jnp.int32)
    arrays += (jnp.asarray(mask),)
    step = partial(losses.distill_loss, objective=Objective(config), step=0)
    (found, sums), gradients = jax.value_and_grad(step, (0, 1), has_aux=True)(*arrays)
    np.testing.assert_allclose(found, total.item(), rtol=1e-5)
    np.testing.assert_allclose(sums["divergence"], divergence.item(), rtol=1e-5)
    np.testing.assert_allclose(sums["ce"], ce.item(), rtol=1e-5)
    for gradient, wanted in zip(gradients, (x.grad, w.grad), strict=True):
        wanted = wanted.numpy()
        np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max())
