"""Messages of the first rank only, before there is a process group."""

import warnings

import pytest

from zolightning.rank_zero import rank_zero_info, rank_zero_warn

VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


@pytest.mark.parametrize("variable", VARIABLES)
def test_launchers_say_which_rank_it_is(
    variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    for other in VARIABLES:  # which Trainers of other tests may have left set
        monkeypatch.delenv(other, raising=False)
    for rank in ("0", "1"):
        monkeypatch.setenv(variable, rank)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            rank_zero_warn(f"warned by {rank}")
            rank_zero_info(f"logged by {rank}")
        assert [str(each.message) for each in warned] == ["warned by 0"] * (rank == "0")
    assert caplog.messages == ["logged by 0"]
