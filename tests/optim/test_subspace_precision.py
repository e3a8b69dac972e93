"""What half-precision weights keep of the updates of a subspace method."""

import pytest
import torch
from torch import nn

from zolightning.kernels import bfloat16
from zolightning.optim import StepRecord, SubspaceMeZO


class TestHalfPrecision:
    @staticmethod
    def realised(update_precision: str, steps: int, rms: float, dtype: torch.dtype = torch.bfloat16) -> list[float]:
        """The shares of the intended move that a weight of RMS 0.02 makes: as it is read, and with what completes it.

        Steps of RMS `rms` go in random directions, new bases come every 100 of them.
        """
        w = nn.Parameter(torch.randn(64, 48, generator=torch.Generator().manual_seed(1)).mul(0.02).to(dtype))
        start = w.detach().double()
        optimizer = SubspaceMeZO([("w", w)], lr=rms * (64 / 8) ** 0.5, rank=8, update_precision=update_precision)
        intended = torch.zeros_like(start)
        for step in range(steps):
            optimizer.apply(StepRecord(step, 0, (optimizer.param_groups[0]["lr"],), (1.0,), (0.0, 0.0), 2, step // 100))
            if step % 100 == 99:
                intended += optimizer.basis(w).lift(optimizer.state[w]["core"].double())
        optimizer.detach()
        state = optimizer.state[w]
        whole = w.detach().double()
        if "low_word" in state:
            whole = bfloat16.read_split(w.detach().flatten(), state["low_word"]).view(w.shape).double()
        elif "master" in state:
            whole = state["master"].view(w.shape).double()
        moves = (w.detach().double() - start, whole - start)
        return [((move * intended).sum() / intended.square().sum()).item() for move in moves]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("rms", [1e-7, 1e-5])
    def test_exact_updates_are_all_there(self, dtype: torch.dtype, rms: float) -> None:
        """Down to what rounds in fp32: 2^-25 of a weight a fold, against 10 rms."""
        assert self.realised("exact", 1000, rms, dtype)[1] == pytest.approx(1, abs=0.01)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("update_precision", "rms", "read", "whole"),
        [
            ("exact", 1e-6, (0.92, 0.985), (0.99, 1.01)),
            ("exact", 1e-5, (0.95, 1.05), (0.99, 1.01)),
            ("native", 1e-6, (0.1, 0.5), (0.1, 0.5)),
            ("native", 1e-5, (0.95, 1.05), (0.95, 1.05)),
        ],
    )
    def test_5000_steps(
        self, update_precision: str, rms: float, read: tuple[float, float], whole: tuple[float, float]
    ) -> None:
        """Rounded once an interval an update of RMS 1e-6 weighs 1e-5, which bf16 mostly loses; ten times that, not.

        What is read of exact updates is rounded once, from weights that were on bf16's grid. For a normal move of RMS s
        and a spacing u a share ``1 + 2 sum_k (-1)^k exp(-2 (pi k s / u)^2)`` of it is then to be expected: 0.953 on
        average over these weights, for s = 1e-6 sqrt(5000), give or take 0.01.
        """
        shares = self.realised(update_precision, 5000, rms)
        for share, (low, high) in zip(shares, (read, whole), strict=True):
            assert low < share < high, shares
