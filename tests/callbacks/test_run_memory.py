"""A run that does not fit into the memory that is free is refused, or warned of."""

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.callbacks.run_memory import refuse_too_large
from zolightning.memory import MemoryPlan

# A run of 34.5 GB, of which 32.5 are certain
TOO_LARGE = MemoryPlan(16_200_000_000, 16_200_000_000, 100_000_000, 2_000_000_000, 0)
OTHERS = {
    "method.update_precision native": MemoryPlan(16_200_000_000, 0, 100_000_000, 2_000_000_000, 0),
    "one layer": MemoryPlan(16_200_000_000, 400_000_000, 100_000_000, 2_000_000_000, 0),
}


def test_a_run_that_cannot_fit_is_refused_with_what_would() -> None:
    with pytest.raises(MisconfigurationException) as raised:
        refuse_too_large(TOO_LARGE, 18_500_000_000, lambda: OTHERS)
    assert str(raised.value).splitlines() == [
        "The run needs 34.5 GB of the device's memory, but only 18.5 GB are free: weights 16.2 GB, state 16.2 GB, "
        "scratch 100.0 MB, activations 2.0 GB, logits 0.0 MB.",
        "Use a smaller batch, or one of these:",
        "  method.update_precision native  18.3 GB",
        "  one layer                       18.7 GB, too much",
    ]


def test_what_needs_no_less_than_the_run_is_not_recommended() -> None:
    smallest = OTHERS["method.update_precision native"]
    with pytest.raises(MisconfigurationException) as raised:
        refuse_too_large(smallest, 10_000_000_000, lambda: {"method.update_precision exact": TOO_LARGE})
    assert str(raised.value).splitlines()[1:] == ["Use a smaller batch."]


def test_a_run_whose_estimate_does_not_fit_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="The run needs 34.5 GB of the device's memory, but only 33.0 GB are free"):
        refuse_too_large(TOO_LARGE, 33_000_000_000, lambda: OTHERS)
    refuse_too_large(TOO_LARGE, 34_500_000_000, lambda: pytest.fail("it fits"))
