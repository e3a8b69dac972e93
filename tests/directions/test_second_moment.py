"""Leading directions of the second moment of inputs: by a sketch where they are wide, and mixed with earlier ones."""

import pytest
import torch

from zolightning.directions.second_moment import SecondMoment, scaled


def test_of_wide_inputs_by_a_sketch() -> None:
    """The directions of a decaying spectrum, better in a second pass; and zeros and NaN have none."""
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(300, 300, generator=generator)).Q
    values = 1 / torch.arange(1, 301)
    read = torch.randn(900, 300, generator=generator) * values.sqrt() @ turn
    exact = torch.linalg.eigh(read.T @ read / len(read))
    moment, errors = SecondMoment(300, 2, 0, "wide", read.device), []
    for _ in range(2):
        moment.again()
        for part in read.split(300):
            moment.add(part)
        leading = moment.leading(2)
        errors.append(1 - torch.linalg.svdvals(leading.directions.T @ exact.eigenvectors[:, -2:])[-1].item())
    assert moment.product.shape == (300, 34)
    assert errors[1] < 1e-3 < errors[0] < 0.1
    torch.testing.assert_close(leading.values, exact.eigenvalues.flip(0)[:2], rtol=0.01, atol=0)
    assert leading.share == pytest.approx((exact.eigenvalues[-2:].sum() / exact.eigenvalues.sum()).item(), rel=0.01)
    assert torch.isfinite(scaled(leading, "whitened", 5.0)).all()
    for bad in (0.0, float("nan")):
        moment = SecondMoment(300, 2, 0, "wide", read.device)
        moment.add(read * bad)
        moment.again()
        moment.add(read * bad)
        assert moment.leading(2) is None


def test_what_is_known_stays_by_its_share() -> None:
    """The mean over old and new rows, where the old ones lie in the directions that were kept."""
    generator = torch.Generator().manual_seed(1)
    old, new = torch.randn(50, 2, generator=generator) @ torch.eye(2, 5), torch.randn(80, 5, generator=generator)
    moments = [SecondMoment(5, 2, 0, "w", old.device) for _ in range(2)]
    for moment, read in zip(moments, (old, new), strict=True):
        moment.add(read)
    moments[1].blend(moments[0].leading(2), 0.75)
    expected = 0.75 * old.T @ old / 50 + 0.25 * new.T @ new / 80
    torch.testing.assert_close(moments[1].product / 80, expected)
    assert moments[1].leading(5).share == pytest.approx(1, rel=1e-5)
