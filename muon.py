"""
Muon (Jordan 2024), an optimizer for matrices; AdamW does the rest.

    gradient -> running mean (momentum) -> nearest orthogonal matrix -> one step of AdamW's size

Its author's text: https://kellerjordan.github.io/posts/muon/
"""

import torch
from torch import Tensor

from machine import has_bfloat16


def orthogonalize(matrices: Tensor) -> Tensor:
    """float (n, rows, columns) -> the same shape and dtype, with singular values near 1.

    For G = U S V^T that is nearly U V^T: values above a hundredth of the norm come out between 0.6
    and 1.2, far smaller ones grow up to 485 times, and zero stays zero. Five Newton-Schulz
    iterations (Jordan 2024), each a polynomial a x + b x^3 + c x^5 of every singular value: matrix
    products only, no SVD, and of all n matrices at once. In bfloat16 on a GPU that has it (Ampere
    and later; older ones only emulate it): exact enough.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices  # so that x x^T is the smaller of the two squares
    if x.is_cuda and has_bfloat16(x.device):
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # now no singular value is above 1
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        square = x @ x.mT
        both = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b square + c square^2
        x = torch.baddbmm(x, both, x, beta=a)  # a x + both x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, but the groups that say so move by Muon (Jordan 2024): momentum, orthogonalised.

    The mean gradient of a matrix is dominated by a few directions. Muon goes equally far in all of
    them: along the orthogonal matrix nearest to it, nearly. The step is scaled to the usual size of
    AdamW's (Liu 2025, section 2.2), so that learning rate and weight decay serve both.

    groups: as for AdamW, each with "muon": True (matrices of one shape, orthogonalised in one go;
    torch.optim.Muon takes one at a time) or False (AdamW, to which betas and eps belong). step()
    passes over what has no gradient, as AdamW does, and leaves none in Muon's matrices.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if not (group["muon"] and matrices):
                continue
            lr, gradients = group["lr"], [matrix.grad for matrix in matrices]
            for matrix in matrices:
                matrix.grad = None  # AdamW passes over what has no gradient
                if not self.state[matrix]:  # AdamW wants a step in every state it loads
                    state = {"step": torch.zeros(()), "momentum": torch.zeros_like(matrix)}
                    self.state[matrix] = state
            momenta = [self.state[matrix]["momentum"] for matrix in matrices]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            ahead = torch._foreach_lerp(gradients, momenta, 0.95)  # Nesterov: weigh it in once more
            directions = orthogonalize(torch.stack(ahead))
            size = 0.2 * max(matrices[0].shape) ** 0.5
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, directions.unbind(), alpha=-lr * size)
        super().step()
