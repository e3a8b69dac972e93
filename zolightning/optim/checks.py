"""Checks of what a method is attached to: settings that go together, and parameters that it can train."""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zolightning.directions.shards import is_sharded, require_rows
from zolightning.kernels.noise import MAX_ELEMENTS
from zolightning.optim.estimators import Estimator


def require_batching(evaluations_per_forward: int, estimator: Estimator) -> None:
    """Raises a ValueError if evaluations are to share a forward pass, and those of this estimator cannot."""
    if evaluations_per_forward > 1 and estimator.why_unbatched:
        raise ValueError(
            f"`evaluations_per_forward` is {evaluations_per_forward}, but with {type(estimator).__name__}() "
            f"{estimator.why_unbatched}. Leave it at 1."
        )


def require_prefix(keep_prefix_gib: float, cuda_graphs: bool) -> None:
    """Raises a ValueError if `keep_prefix_gib` is negative, or above 0 with CUDA graphs, which skip no layers."""
    if not keep_prefix_gib >= 0:
        raise ValueError(f"`keep_prefix_gib` must not be negative, got {keep_prefix_gib}.")
    if cuda_graphs and keep_prefix_gib:
        raise ValueError(
            "`cuda_graphs` is True, but a graph runs the whole network: leave `keep_prefix_gib` at 0, got "
            f"{keep_prefix_gib}."
        )


def refuse_with_shards(settings: Iterable[tuple[str, object, str]]) -> None:
    """Raises a ValueError that names the first of some settings which do not work with sharded parameters (FSDP2).

    Each has a name, a value, and one that works.
    """
    for name, value, accepted in settings:
        raise ValueError(
            f"`{name}` is {value}, which does not support parameters that are sharded over ranks. Use {accepted}, or a "
            "strategy under which every rank holds all of them ('zo_ddp')."
        )


def require_trainable(names: Mapping[nn.Parameter, str]) -> None:
    """Raises a ValueError unless there are parameters, and forward passes can train all of them."""
    if not names:
        raise ValueError("No parameter is trainable: all of the optimizer's have `requires_grad=False`.")
    for parameter, name in names.items():
        if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
            raise ValueError(
                f"Parameter `{name}` has dtype {parameter.dtype}; trainable are float64, float32, bfloat16 and "
                "float16. Freeze it (`requires_grad=False`)."
            )
        if parameter.numel() > MAX_ELEMENTS:
            raise ValueError(
                f"Parameter `{name}` has {parameter.numel()} elements, but at most {MAX_ELEMENTS} can train. Freeze it."
            )
        require_rows(name, parameter)
        if is_traceable_wrapper_subclass(parameter) and not is_sharded(parameter):
            raise ValueError(
                f"Parameter `{name}` is a {type(parameter).__name__}, whose numbers are in other tensors, as those of "
                "quantised weights are. Freeze it (`requires_grad=False`), and train an adapter or other layers."
            )
