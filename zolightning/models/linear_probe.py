"""Linear probing: the rows of a frozen model's head that stand for answers, fitted by logistic regression."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from zolightning.callbacks.linear_probing import head_features
from zolightning.data.encoding import Batch
from zolightning.head import is_tied, set_rows, untie_head
from zolightning.logistic_regression import CS, check_probe, most_accurate_c, probe
from zolightning.models.causal_lm import CausalLM
from zolightning.quantization import Quantization


class LinearProbe(CausalLM):
    """A causal language model of which one step fits the head, by logistic regression on all training examples.

    Features are what the head reads before each token of the right answers; classes are these tokens. Each class's row
    of the head becomes its weights; where the head is tied to the embeddings, it becomes a copy of them first. All else
    is frozen. As MeZO's ``--linear_probing`` (Malladi et al. 2023, arXiv:2305.17333), with scikit-learn's
    ``LogisticRegressionCV`` in place: no intercept, and the penalty that does best in five-fold cross-validation.

    The probe alone, as a baseline. For training that begins at one see
    :class:`~zolightning.callbacks.LinearProbing`.

    Args:
        model_name, dtype, attention, quantization: As of :class:`CausalLM`.
        cs: Weights of the data against the penalty to choose from; one alone is taken without cross-validation, which
            takes long where answers have thousands of different tokens.
        tolerance: The largest entry of the gradient at which a fit ends. MeZO's ``--lp_early_stopping`` is 0.01.
    """

    def __init__(
        self,
        model_name: str,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        attention: str | None = None,
        quantization: Quantization | None = None,
        cs: Sequence[float] = CS,
        tolerance: float = 1e-4,
    ) -> None:
        check_probe(cs, tolerance)
        super().__init__(model_name, dtype=dtype, attention=attention, quantization=quantization)
        self.automatic_optimization = False
        self.cs = tuple(cs)
        self.tolerance = tolerance
        if is_tied(self.model):
            untie_head(self.model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter is self.head.weight)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.max_steps != 1:
            raise MisconfigurationException(
                f"`trainer.max_steps` is {self.trainer.max_steps}, and one step fits a LinearProbe: set it to 1."
            )
        super().setup(stage)

    def configure_optimizers(self) -> Any:
        return LogisticRegression(self.head, self.cs, self.tolerance)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]  # it optimizes by itself
        """Fits the head to all examples, whichever the batch."""
        optimizer: Any = self.optimizers()
        found = optimizer.step(lambda: head_features(self.trainer, self)[:2])
        self.log("train/accuracy", found, prog_bar=True)


class LogisticRegression(Optimizer):
    """Fits some rows of a linear map in one step.

    Args:
        head: The map; its bias, if any, becomes 0 for these rows.
        cs, tolerance: As of :class:`LinearProbe`.
    """

    def __init__(self, head: nn.Linear, cs: Sequence[float], tolerance: float) -> None:
        super().__init__([head.weight], {"cs": tuple(cs), "tolerance": tolerance})
        self._head = head

    def step(self, closure: Callable[[], tuple[Tensor, Tensor]]) -> float:  # type: ignore[override]
        """Fits the rows that the closure's second tensor, (K,), names to the first one, (K, H).

        Returns:
            The share of features of which the fitted rows say the right one.
        """
        features, rows = closure()
        cs, tolerance = (self.param_groups[0][name] for name in ("cs", "tolerance"))
        found = probe(features, rows, cs, tolerance, most_accurate_c)
        set_rows(self._head, found.rows, found.weights)
        rank_zero_info(f"Linear probing: {found}")
        return found.accuracy
