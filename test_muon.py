"""
The specification of muon.py: the orthogonalisation by its polynomial, the optimizer by its
recurrence, by torch's own AdamW and by torch's own Muon.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import muon
from muon import Muon, orthogonalize

seeds = pytest.mark.parametrize("seed", range(3))


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def newton_schulz(sigma, steps=5):
    """What Jordan's five polynomials make of a singular value."""
    for _ in range(steps):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return sigma


# ---- Orthogonalising ----


@pytest.mark.parametrize("rows, columns", [(5, 3), (3, 5), (4, 4), (7, 1)])
def test_orthogonalising_keeps_the_singular_vectors_and_levels_the_values(rows, columns):
    """U S V^T -> U f(S / |S|) V^T for each matrix of the stack by itself; f is near 1."""
    matrices = normal(rows, 6, rows, columns)
    matrices *= 10.0 ** torch.arange(-3, 3).view(6, 1, 1)
    before = matrices.clone()
    levelled = orthogonalize(matrices)
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    S = newton_schulz(S / (S.norm(dim=1, keepdim=True) + 1e-7))
    close(levelled, (U * S[:, None]) @ V, 1e-9)
    assert torch.equal(matrices, before)


@pytest.mark.parametrize("rows, columns", [(4, 32), (32, 4)])
def test_the_squares_are_those_of_the_smaller_side(rows, columns):
    """Five times x x^T, its square and a product with x. Of the larger side it would be the same
    numbers for ten times the work, where a layer is four times as wide as high."""
    with FlopCounterMode(display=False) as counter:
        orthogonalize(normal(0, 2, rows, columns))
    assert counter.get_total_flops() == 2 * 5 * 2 * (4 * 4 * 32 + 4 * 4 * 4 + 4 * 4 * 32)


@pytest.mark.parametrize("is_cuda, has_it", [(True, True), (True, False), (False, True)])
def test_it_computes_in_bfloat16_on_gpus_that_have_it(is_cuda, has_it, monkeypatch):
    """A T4 only emulates it, four times as slowly as float16."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
    monkeypatch.setattr(muon, "has_bfloat16", lambda _: has_it)
    used, real = set(), torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda x, *a, **k: used.add(x.dtype) or real(x, *a, **k))
    assert orthogonalize(normal(0, 2, 4, 6).float()).dtype == torch.float32
    assert used == {torch.bfloat16 if is_cuda and has_it else torch.float32}


def test_values_above_a_hundredth_of_the_norm_end_between_0_6_and_1_2():
    """diag(cos, sin) has norm 1. Far smaller values grow 3.4445^5 = 484.9 times, to stay small."""
    angles = torch.linspace(0.01, math.pi / 2, 10_000, dtype=torch.float64)
    levelled = orthogonalize(torch.diag_embed(torch.stack([angles.cos(), angles.sin()], 1)))
    sines = levelled[:, 1, 1]
    assert 0.6 < sines.min() and sines.max() < 1.21
    tiny = orthogonalize(torch.diag(torch.tensor([1, 1e-9], dtype=torch.float64))[None])
    assert tiny[0, 1, 1] == pytest.approx(484.9e-9, rel=1e-3)


def test_orthogonalising_a_gradient_of_zeros_gives_zeros():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


# ---- The optimizer ----


def two_copies(seed):
    """Three matrices of one shape for Muon, a matrix and a vector for AdamW; twice."""
    shapes = [(4, 6), (4, 6), (4, 6), (3, 4), (5,)]
    return ([nn.Parameter(normal(seed + i, *s)) for i, s in enumerate(shapes)] for _ in range(2))


def muon_of(parameters):
    groups = [
        {"params": parameters[:3], "weight_decay": 0.3, "muon": True},
        {"params": parameters[3:4], "weight_decay": 0.3, "muon": False},
        {"params": parameters[4:], "weight_decay": 0.0, "muon": False},
    ]
    return Muon(groups, lr=0.1, fused=True)


def adamw_of(parameters):
    groups = [
        {"params": parameters[3:4], "weight_decay": 0.3},
        {"params": parameters[4:], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.1, fused=True)


def set_gradients(parameters, seed, step):
    for i, parameter in enumerate(parameters):
        parameter.grad = normal(1000 + 100 * seed + 10 * step + i, *parameter.shape)


@torch.no_grad()
def muon_by_svd(matrix, momentum, lr):
    """M <- 0.95 M + 0.05 G, step along orth(0.95 M + 0.05 G), 0.2 sqrt(max(rows, columns)) long."""
    momentum.copy_(0.95 * momentum + 0.05 * matrix.grad)
    U, S, V = torch.linalg.svd(0.95 * momentum + 0.05 * matrix.grad, full_matrices=False)
    direction = (U * newton_schulz(S / S.norm())) @ V
    matrix.copy_(matrix - lr * 0.3 * matrix - lr * 0.2 * math.sqrt(max(matrix.shape)) * direction)


@seeds
def test_muon_is_its_recurrence_for_the_matrices_and_adamw_for_the_rest(seed):
    """With the learning rate that each step finds in the groups, as a schedule leaves it there."""
    parameters, expected = two_copies(seed)
    optimizer, adamw = muon_of(parameters), adamw_of(expected)
    momenta = [torch.zeros_like(matrix) for matrix in expected[:3]]
    for step in range(4):
        set_gradients(parameters, seed, step)
        set_gradients(expected, seed, step)
        lr = 0.1 / (step + 1)
        for group in [*optimizer.param_groups, *adamw.param_groups]:
            group["lr"] = lr
        for matrix, momentum in zip(expected[:3], momenta):
            muon_by_svd(matrix, momentum, lr)
        optimizer.step()
        adamw.step()
    for actual, wanted in zip(parameters, expected, strict=True):
        close(actual, wanted, 1e-6)  # |S| + 1e-7 in the code


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_muon_steps_as_torchs_own_does(shape):
    """torch.optim.Muon, by other hands, computes in bfloat16: two digits agree."""
    ours, theirs = (nn.Parameter(normal(1, *shape).float()) for _ in range(2))
    optimizer = Muon([{"params": [ours], "weight_decay": 0.1, "muon": True}], lr=0.1)
    peer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for step in range(5):
        ours.grad = normal(step + 2, *shape).float()
        theirs.grad = ours.grad.clone()
        optimizer.step()
        peer.step()
    assert (ours - start).abs().max() > 0.1 > 10 * (ours - theirs).abs().max()


def test_a_step_leaves_no_gradient_in_muons_matrices():
    """AdamW, whose step comes after, would move them as well."""
    parameters, _ = two_copies(0)
    set_gradients(parameters, 0, 0)
    muon_of(parameters).step()
    assert [parameter.grad is None for parameter in parameters] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("missing", [(0,), (1, 3), (0, 1, 2), (4,), (0, 1, 2, 3, 4)])
def test_what_has_no_gradient_stays_as_it_is_and_the_rest_moves_as_if_alone(missing):
    """A learner takes a part out of the forward pass, and trains what is left."""
    parameters, alone = two_copies(0)
    before = [parameter.detach().clone() for parameter in parameters]
    present = [i for i in range(5) if i not in missing]
    optimizer, adamw = muon_of(parameters), adamw_of(alone)
    momenta = [torch.zeros_like(matrix) for matrix in alone[:3]]
    for step in range(2):
        set_gradients(parameters, 0, step)
        set_gradients(alone, 0, step)
        for i in missing:
            parameters[i].grad = alone[i].grad = None
        optimizer.step()
        for i in present:
            if i < 3:
                muon_by_svd(alone[i], momenta[i], 0.1)
        adamw.step()
    for i in missing:
        assert torch.equal(parameters[i], before[i])
    for i in present:
        close(parameters[i], alone[i], 1e-6)
        assert not torch.equal(parameters[i], before[i])


@seeds
def test_a_saved_and_loaded_muon_continues_as_if_nothing_had_happened(seed):
    """Bit for bit, from state dicts that hold plain data: its momentum is in them."""
    parameters, others = two_copies(seed)
    optimizer, other = muon_of(parameters), muon_of(others)
    for step in range(2):
        set_gradients(parameters, seed, step)
        optimizer.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, its_copy in zip(parameters, others):
        its_copy.data.copy_(parameter)
        parameter.grad, its_copy.grad = (normal(7, *parameter.shape) for _ in range(2))
    optimizer.step()
    other.step()
    assert all(map(torch.equal, parameters, others))
