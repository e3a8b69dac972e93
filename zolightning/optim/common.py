"""The settings that methods have in common, which tell type checkers and editors what ``**common`` takes.

What they mean, their defaults and their checks are with the constructors that read them, those of
:class:`~zolightning.optim.base.ZerothOrderOptimizer`, :class:`~zolightning.optim.dense.DenseOptimizer` and
:class:`~zolightning.optim.subspace.SubspaceOptimizer`.
"""

from typing import TYPE_CHECKING, Any, TypedDict

from zolightning.kernels.noise import NoiseKind
from zolightning.optim.estimators import Estimator
from zolightning.optim.precision import UpdatePrecision

if TYPE_CHECKING:
    from typing import Unpack as Unpack
else:

    class Unpack:
        """At run time, any arguments: the command line would take these names for arguments without defaults."""

        def __class_getitem__(cls, settings: type) -> Any:
            return Any


class Basic(TypedDict, total=False):
    """Of every method."""

    align_queries: bool
    seed: int | None
    update_precision: UpdatePrecision


class Common(Basic, total=False):
    """Of every method whose base takes the noise."""

    noise: NoiseKind


class CommonAndQueries(Common, total=False):
    """Of methods with dense directions that have an argument for the estimator."""

    num_queries: int


class DenseSettings(CommonAndQueries, total=False):
    """Of methods with dense directions."""

    estimator: Estimator | None


class SubspaceCommon(Common, total=False):
    """Of subspace methods that have arguments for queries and estimator."""

    normalize: bool
    normalize_directions: bool
    clip: float | None
    rms_decay: float
    offload_low_words: bool


class SubspaceAndEstimator(SubspaceCommon, total=False):
    """Of subspace methods that have an argument for queries."""

    estimator: Estimator | None


class SubspaceSettings(SubspaceAndEstimator, total=False):
    """Of subspace methods."""

    num_queries: int
