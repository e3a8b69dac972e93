"""Rules on profiles written by hand."""

from itertools import product

import pytest

from zolightning.scopes.activation_profile import ActivationProfile, Fingerprint, LayerStatistics
from zolightning.scopes.rules import Absolute, Both, Jump, RatioToMedian, Rule, select


def profile(*maxima: float, median: float = 1.0) -> ActivationProfile:
    layers = tuple(LayerStatistics(value, median, median, value, (0,), (0,)) for value in maxima)
    return ActivationProfile(Fingerprint("Layer", len(layers), "0"), 1, layers)


@pytest.mark.parametrize(
    ("rule", "maxima", "chosen"),
    [
        (Absolute(), [100.0, 100.1, 900.0], 1),
        (Absolute(1000.0), [100.0, 100.1, 900.0], None),
        (Absolute(0.5), [0.4, 0.6], 1),
        (RatioToMedian(), [999.0, 1000.0, 5000.0], 1),
        (RatioToMedian(2000.0), [999.0, 1000.0], None),
        (RatioToMedian(0.5), [0.4, 0.6], 1),
        (Both(Absolute(3000.0), RatioToMedian()), [999.0, 1000.0, 5000.0], 2),
        (Both(Absolute(), RatioToMedian(9000.0)), [999.0, 1000.0, 5000.0], None),
        (Jump(), [1.0, 4.9, 24.0, 24.0], None),
        (Jump(), [1.0, 5.0, 20.0, 20.0], 1),
        (Jump(), [1.0, 5.0, 30.0, 30.0], 2),
        (Jump(), [1.0, 5.0, 6.0, 90.0], 1),
        (Jump(first_half_only=False), [1.0, 5.0, 6.0, 90.0], 3),
        (Jump(20.0, first_half_only=False), [1.0, 5.0, 6.0, 90.0], None),
        (Jump(), [0.0, 5.0, 30.0, 1.0], 2),
        (Jump(), [7.0], None),
        (Jump(first_half_only=False), [1.0, 9.0], 1),
    ],
)
def test_rule(rule: Rule, maxima: list[float], chosen: int | None) -> None:
    assert rule(profile(*maxima)) == chosen


def test_a_median_of_zero_is_no_ratio() -> None:
    assert RatioToMedian()(profile(5.0, median=0.0)) is None


def test_the_first_rule_that_fires_decides() -> None:
    jumps = profile(1.0, 2.0, 40.0, 41.0, 41.0)
    assert select(jumps) == (2, "Jump(ratio=5.0, first_half_only=True)")
    massive = profile(1.0, 200.0, 200.0, 3000.0)
    assert select(massive) == (3, "Both(one=Absolute(threshold=100.0), other=RatioToMedian(ratio=1000.0))")
    assert select(massive, [Absolute(500.0), Absolute(50.0)])[0] == 3
    assert select(massive, [Absolute(5000.0), Absolute(50.0)]) == (1, "Absolute(threshold=50.0)")


def test_no_rule_fires() -> None:
    with pytest.raises(
        ValueError, match=r"No layer stands out by `rules` Absolute\(threshold=50.0\): give looser ones"
    ):
        select(profile(1.0, 2.0), [Absolute(50.0)])


@pytest.mark.parametrize(
    ("make", "value"),
    [
        *product([Absolute, RatioToMedian, Jump], [-1.0, 0, float("nan"), float("inf"), "5", True]),
        (Jump, 1.0),
    ],
)
def test_values_out_of_range(make: type[Rule], value: object) -> None:
    with pytest.raises(ValueError, match=r"`(threshold|ratio)` must be a number above [01], got"):
        make(value)
