"""The training step against the same step written plainly in PyTorch with transformers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from variants import build

import data
import distill
import losses
import models
import optim
import student as students
from models.hub import leaves

pytestmark = pytest.mark.usefixtures("strict")

STEPS, KEPT = 3, (0, 2)
LR, DECAY, EPS, BETAS, CLIP = 1e-2, 0.3, 1e-4, (0.9, 0.95), 0.25
ALPHA, TEMPERATURE, BETA = 0.5, 2.0, 0.3


def batch_of(seed: int, rows: int = 4, seq: int = 24) -> data.Batch:
    """A document in each row, of which the first rows learn few tokens and the last nearly all."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 96, (rows, seq + 1)).astype(np.int32)
    mask = rng.random((rows, seq)) < np.linspace(0.1, 1, rows)[:, None]
    return data.Batch(tokens, np.ones_like(tokens), mask)


def cut(teacher: torch.nn.Module) -> torch.nn.Module:
    student = copy.deepcopy(teacher)
    decoder = student.base_model
    name = "h" if hasattr(decoder, "h") else "layers"
    blocks = getattr(decoder, name)
    setattr(decoder, name, torch.nn.ModuleList(blocks[i] for i in KEPT))
    decoder.config.num_hidden_layers = len(KEPT)
    return student


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def divergence(name: str, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    match name:
        case "forward_kl":
            return kl(log_p, log_q)
        case "reverse_kl":
            return kl(log_q, log_p)
    mixture = torch.log(BETA * log_p.exp() + (1 - BETA) * log_q.exp())
    return BETA * kl(log_p, mixture) + (1 - BETA) * kl(log_q, mixture)


def torch_steps(teacher, student, batches, name):
    """Trains `student`; gives the loss and the gradient's norm after each step."""
    parameters = list(student.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    for batch in batches:
        tokens, mask = torch.tensor(batch.tokens).long(), torch.tensor(batch.mask)
        with torch.no_grad():
            wanted = teacher(tokens[:, :-1], use_cache=False).logits[mask]
        logits = student(tokens[:, :-1], use_cache=False).logits[mask]
        apart = divergence(
            name, (wanted / TEMPERATURE).log_softmax(-1), (logits / TEMPERATURE).log_softmax(-1)
        )
        ce = F.cross_entropy(logits, tokens[:, 1:][mask])
        loss = ALPHA * TEMPERATURE**2 * apart.mean() + (1 - ALPHA) * ce
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        assert norm > 2 * CLIP
        optimizer.step()
        yield loss.item(), norm.item()


@pytest.mark.parametrize(
    "name, measure, microbatches",
    [
        ("bloom", "forward_kl", 1),
        ("bloom", "jsd", 2),
        ("smollm2", "forward_kl", 1),
        ("llama-biases", "forward_kl", 2),
        ("llama-biases", "reverse_kl", 1),
    ],
)
def test_steps_equal_torch(name, measure, microbatches, tmp_path):
    reference = build(name, seed=0)
    reference.save_pretrained(tmp_path)
    teacher, theirs = models.load(tmp_path), cut(reference)
    loss = losses.Config(measure, alpha=ALPHA, temperature=TEMPERATURE, beta=BETA, chunk=10)
    objective = losses.Objective(loss, STEPS, microbatches=microbatches)
    config = optim.Config(
        lr=LR, warmup=0, schedule="constant", weight_decay=DECAY, clip=CLIP, betas=BETAS, eps=EPS
    )
    optimizer = optim.make(config, STEPS)
    state = distill.init_state(students.cut(teacher, {"layers": KEPT}), optimizer)
    batches = [batch_of(seed) for seed in range(STEPS)]
    expected = torch_steps(reference, theirs, batches, measure)
    for batch, (value, norm) in zip(batches, expected, strict=True):
        state, metrics = distill.step((teacher, batch), state, optimizer, objective)
        assert metrics["loss"] == pytest.approx(value, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        wanted = {name: p.detach() for name, p in theirs.named_parameters()}
        for leaf in leaves(state.student):
            parts = leaf.array if leaf.stacked else leaf.array[None]
            for name, part in zip(leaf.names, parts, strict=True):
                found, goal = np.asarray(part).reshape(leaf.shape), wanted.pop(name).numpy()
                assert np.abs(found - goal).max() <= 1e-5, name
        assert not wanted
