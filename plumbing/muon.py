"""Muon, an optimizer for matrices: MomentUm Orthogonalized by Newton-Schulz.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. AdamW treats a matrix as a list of numbers. Muon treats
it as a linear map: of the momentum's singular value decomposition U S V^T it keeps U V^T, so the weights move equally
far in every direction, not only in the few in which the gradient is large. Scaled by 0.2 sqrt(max(rows, columns)), the
update has the root mean square of AdamW's, and both can share one learning rate (Liu et al. 2025, arXiv 2502.16982,
section 2.2).
"""

import math
from collections import defaultdict

import torch


class Muon(torch.optim.Optimizer):
    """For matrices only. The products are computed in dtype, whatever the dtype of the weights."""

    def __init__(self, matrices, lr, weight_decay, momentum=0.95, dtype=torch.float32):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = defaultdict(list)  # one large product for many matrices instead of many small ones
            for matrix in group["params"]:
                if matrix.grad is not None:  # a frozen one has none
                    same_shape[matrix.shape].append(matrix)
            for shape, matrices in same_shape.items():
                directions = []
                for matrix in matrices:
                    if matrix not in self.state:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                    momentum = self.state[matrix]["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                    directions.append(matrix.grad.lerp(momentum, group["momentum"]))  # Nesterov: one step ahead
                updates = orthogonalize(torch.stack(directions).to(self.dtype))  # (n, rows, columns)
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonalize(X):
    """U V^T of each matrix U S V^T, approximately: (n, rows, columns) -> the same shape.

    Newton-Schulz needs matrix products only. An odd polynomial of a matrix, a X + b (X X^T) X + c (X X^T)^2 X, is the
    same polynomial of its singular values. With these coefficients (from the post cited above) five rounds bring those
    between 0.01 and 1 close to 1, between 0.7 and 1.2, which serves an optimizer as well as 1 would.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if tall := X.size(1) > X.size(2):
        X = X.mT  # so that X X^T is the smaller of the two possible products
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X
