"""A run goes on with the method, and with the arguments, that its checkpoint was written with."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

from conftest import METHODS
from zolightning.optim import LOZO, HiZOO, MeZO, MeZOAdam, SubZero, ZerothOrderOptimizer, common
from zolightning.optim.estimators import OneSided
from zolightning.optim.settings import constructor_arguments


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 3, dtype=dtype))]


@pytest.mark.parametrize("method", [MeZO, LOZO, HiZOO])
def test_a_wrong_argument_is_that_of_the_method(method: type[ZerothOrderOptimizer]) -> None:
    """Python would blame a base class, which takes what the classes on the way pass on."""
    with pytest.raises(TypeError) as raised:
        method(weights(), lr=1e-3, epss=1e-3)  # type: ignore[call-arg]
    words = f"{method.__name__} has no argument `epss` (did you mean `eps`?); accepted: align_queries, "
    assert str(raised.value).startswith(words)


MEZO = partial(MeZO, lr=1e-3, estimator=OneSided())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (partial(LOZO, lr=1e-3), "written by MeZO, but this run trains with LOZO"),
        (partial(MeZOAdam, lr=1e-3), "written by MeZO, but this run trains with MeZOAdam"),
        (partial(MEZO, num_queries=4), "`num_queries` is 4, was 1"),
        (partial(MeZO, lr=1e-3), "`estimator` is 'TwoSided', was 'OneSided'"),
        (partial(MEZO, noise="rademacher"), "`noise` is 'rademacher', was 'gaussian'"),
        (partial(MEZO, update_precision="native"), "`update_precision` is 'native', was 'exact'"),
        (partial(MEZO, eps=1e-2), "`eps` is 0.01, was 0.001"),
        (partial(MEZO, momentum=0.5, clip=2.0), "`momentum` is 0.5, was 0.0; `clip` is 2.0, was None"),
    ],
)
def test_another_method_or_argument_is_refused(method: Callable[..., Any], words: str) -> None:
    saved = MEZO(weights()).state_dict()
    with pytest.raises(ValueError) as raised:
        method(weights()).load_state_dict(saved)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_arguments_of_one_class_are_known(no_grad: None) -> None:
    saved = SubZero(weights(), rank=2, scaling="paper").state_dict()
    with pytest.raises(ValueError, match="`rank` is 3, was 2; `scaling` is 'code', was 'paper'"):
        SubZero(weights(), rank=3).load_state_dict(saved)


def test_adam_is_not_dropped_unsaid(no_grad: None) -> None:
    saved = SubZero(weights(), rank=2, betas=(0.8, 0.9)).state_dict()
    with pytest.raises(ValueError, match=r"`betas` is None, was \(0.8, 0.9\)"):
        SubZero(weights(), rank=2).load_state_dict(saved)


def test_another_schedule_of_smoothing_is_refused() -> None:
    saved = HiZOO(weights(), smoothing={5: 0.1, 0: 0.2}).state_dict()
    HiZOO(weights(), smoothing={"0": 0.2, "5": 0.1}).load_state_dict(saved)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"`smoothing` is \(\(0, 0\.2\), \(5, 0\.3\)\), was .*\(5, 0\.1\)\)"):
        HiZOO(weights(), smoothing={0: 0.2, 5: 0.3}).load_state_dict(saved)


def test_another_dtype_is_refused() -> None:
    saved = MEZO(weights()).state_dict()
    with pytest.raises(ValueError, match="`dtype` is 'bfloat16', was 'float32'"):
        MEZO(weights(torch.bfloat16)).load_state_dict(saved)


@pytest.mark.parametrize("method", [MEZO, partial(LOZO, lr=1e-3), partial(SubZero, lr=1e-3)])
@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.Adam])
def test_the_state_of_a_first_order_optimizer_is_refused(method: Any, other: Any) -> None:
    with pytest.raises(ValueError, match="is none of this package's methods"):
        method(weights()).load_state_dict(other(weights(), lr=0.1).state_dict())


def test_the_learning_rate_of_the_checkpoint_holds_and_is_said() -> None:
    optimizer = MEZO(weights(), lr=0.5)
    with pytest.warns(UserWarning, match=r"`lr` continues as in the checkpoint, whose run was given 0\.001; the 0\.5 "):
        optimizer.load_state_dict(MEZO(weights()).state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_the_same_settings_with_another_seed_go_on() -> None:
    optimizer = MEZO(weights(), seed=2)
    optimizer.load_state_dict(MEZO(weights(), seed=7).state_dict())
    assert optimizer.param_groups[0]["seed"] == 7


def test_rates_of_vectors_are_said_as_they_were_given() -> None:
    saved = LOZO(weights(), lr=1e-3, vector_lr=3e-5).state_dict()
    with pytest.warns(UserWarning) as said:
        LOZO(weights(), lr=2e-3, vector_lr=7e-5).load_state_dict(saved)
    messages = [str(warning.message) for warning in said]
    assert [message.partition(";")[0] for message in messages] == [
        "`lr` continues as in the checkpoint, whose run was given 0.001",
        "`vector_lr` continues as in the checkpoint, whose run was given 3e-05",
    ]


@pytest.mark.parametrize("method", {made.func: None for made in METHODS.values()})
def test_type_checkers_know_all_arguments(method: type[ZerothOrderOptimizer]) -> None:
    found = re.search(r"\*\*common: Unpack\[(\w+)\]", inspect.getsource(method.__init__))
    assert found is not None
    known = get_type_hints(getattr(common, found[1]))
    own = inspect.signature(method.__init__).parameters
    accepted = constructor_arguments(method) - {"self", "params", "defaults"}
    assert known.keys() | own.keys() - {"self", "params", "common"} == accepted
    for base in method.__mro__[1:]:
        if "__init__" in vars(base) and issubclass(base, ZerothOrderOptimizer):
            of_base = get_type_hints(base.__init__)
            assert {name: of_base[name] for name in known.keys() & of_base.keys()}.items() <= known.items()
