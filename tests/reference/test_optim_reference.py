"""AdamW with clipping, decay groups and a schedule, against PyTorch."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import Array, Float

import optim


class Block(eqx.Module):
    up: Float[Array, "mlp embed"]
    up_bias: Float[Array, " mlp"]
    norm: Float[Array, " embed"]


DECAYED = ("up",)
SHAPES = {"up": (3, 16, 8), "up_bias": (3, 16), "norm": (3, 8)}


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adamw_steps_equal_torch(clip):
    config = optim.Config(
        lr=0.01, warmup=3, schedule="cosine", weight_decay=0.1, clip=clip, betas=(0.9, 0.95)
    )
    optimizer = optim.make(config, 8)
    rng = np.random.default_rng(0)

    def draw():
        return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}

    start = draw()
    params = Block(**{n: jnp.asarray(value) for n, value in start.items()})
    state = optimizer.init(params)
    theirs = {n: torch.nn.Parameter(torch.tensor(value)) for n, value in start.items()}
    groups = [
        {"params": [theirs[n] for n in DECAYED], "weight_decay": 0.1},
        {"params": [theirs[n] for n in SHAPES if n not in DECAYED], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    warm = torch.optim.lr_scheduler.LinearLR(reference, 1 / 3, 1.0, total_iters=2)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=5)
    schedule = torch.optim.lr_scheduler.SequentialLR(reference, [warm, fall], milestones=[3])
    for step in range(8):
        grads = draw()
        ours = Block(**{n: jnp.asarray(value) for n, value in grads.items()})
        params, state, stats = optimizer.update(ours, state, params, jnp.array(step, jnp.int32))
        for n, value in grads.items():
            theirs[n].grad = torch.tensor(value)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), clip or float("inf"))
        np.testing.assert_allclose(stats["lr"], reference.param_groups[0]["lr"], rtol=1e-5)
        np.testing.assert_allclose(stats["grad_norm"], norm, rtol=1e-6)
        reference.step()
        schedule.step()
        for n, value in theirs.items():
            np.testing.assert_allclose(
                getattr(params, n), value.detach(), rtol=0, atol=1e-6, err_msg=f"{n}, step {step}"
            )
