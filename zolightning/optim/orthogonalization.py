"""Orthogonalization: functions that keep the singular vectors of matrices and replace their singular values.

All of them take batches of matrices, (..., r, n), in float32 or float64. They are fastest if n is the longer side.
"""

import torch
from torch import Tensor

# Muon's quintic, and how often: it takes singular values from 0.01 of the norm to [0.68, 1.20]
_NEWTON_SCHULZ, _STEPS = (3.4445, -4.7750, 2.0315), 5
_TINY = 1e-30


def newton_schulz(matrices: Tensor) -> Tensor:
    """Approximates ``msign`` by Muon's iteration ``X <- a X + (b X X' + c (X X')^2) X`` (arXiv 2602.17155).

    Every iterate is a polynomial in ``X X'`` times the first X, so the iteration runs on the small Gram matrix and
    multiplies by the long side twice in all, not three times per step. Zero matrices stay zero.
    """
    a, b, c = _NEWTON_SCHULZ
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    scaled = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(_TINY)
    gram = scaled @ scaled.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)

    def polynomial(gram: Tensor) -> Tensor:
        return a * identity + b * gram + c * (gram @ gram)

    product = factor = polynomial(gram)
    for _ in range(_STEPS - 1):
        gram = factor @ gram @ factor  # they commute, and are symmetric
        factor = polynomial(gram)
        product = factor @ product
    result = product @ scaled
    return result if wide is matrices else result.mT


def msign(matrices: Tensor) -> Tensor:
    """``U V'`` of the singular value decomposition ``U S V'``; zero matrices stay zero."""
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    rank = s > s[..., :1] * max(matrices.shape[-2:]) * torch.finfo(s.dtype).eps
    return (u * rank.unsqueeze(-2).to(u.dtype)) @ vh


def power_iteration(matrices: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """One streaming power iteration and the partial orthogonalization it gives (ZO-MOPI, arXiv 2605.09034).

    ``V = QR(M' (M V))`` and ``U = `` the columns of ``M V`` at unit length: ``U V'`` has k singular values near 1
    where M has its k largest, zero elsewhere, and Frobenius norm sqrt(k) exactly.

    Args:
        matrices: M, shape (..., r, n).
        right: V of the step before, orthonormal, shape (..., n, k).

    Returns:
        ``U V'``, and V for the next step; where M is zero, zero and V as it was.
    """
    scale = matrices.abs().amax(dim=(-2, -1), keepdim=True)
    scaled = matrices / scale.clamp_min(_TINY)
    new = torch.linalg.qr(scaled.mT @ (scaled @ right)).Q
    new = torch.where(scale > 0, new, right)
    image = scaled @ new
    left = image / image.norm(dim=-2, keepdim=True).clamp_min(_TINY)
    return left @ new.mT, new
