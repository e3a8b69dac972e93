"""Changes for a while which parameters are trainable."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def trainable_as(wanted: Mapping[nn.Parameter, bool]) -> Iterator[None]:
    """A context in which ``requires_grad`` of these parameters is as wanted; afterwards it is what it was before."""
    before = {parameter: parameter.requires_grad for parameter in wanted}
    try:
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
        yield
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
