"""Linear probing as a baseline: a frozen model whose head is fitted by logistic regression."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from zolightning.data.batch import Batch
from zolightning.models.causal_lm import CausalLM
from zolightning.network.head import is_tied, set_rows, untie_head
from zolightning.network.logistic_regression import CS, check_probe, fit_probe, joined_features, most_accurate
from zolightning.network.quantization import Quantization
from zolightning.rank_zero import rank_zero_info
from zolightning.scopes.calibration import read_examples


class LogisticRegressionLM(CausalLM):
    """A frozen causal language model whose head is fitted by logistic regression, in one training step.

    This is linear probing alone, the baseline of MeZO's ``--linear_probing`` (Malladi et al. 2023, arXiv:2305.17333).
    The callback :class:`~zolightning.callbacks.LinearProbing` begins a fit of any module at such a head instead.

    The features are the hidden states from which the head predicts each token of the right answers, and the classes
    are these tokens. The weights of a class become its row of the head; a head that is tied to the embeddings becomes
    a copy of them first. The fit is that of scikit-learn's ``LogisticRegressionCV`` without an intercept: the penalty
    is the one with the best accuracy in five-fold cross-validation.

    Args:
        model_name, dtype, attention, quantization: see :class:`CausalLM`.
        cs: values to choose from for the weight of the data against the penalty; a single value is used without
            cross-validation, which takes long if answers have thousands of different tokens.
        tolerance: the largest entry of the gradient at which a fit ends. MeZO's ``--lp_early_stopping`` is 0.01.
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
                f"`trainer.max_steps` is {self.trainer.max_steps}, but LogisticRegressionLM is fitted in one step: set "
                "it to 1."
            )
        super().setup(stage)

    def configure_optimizers(self) -> Any:
        return LogisticRegression(self.head, self.cs, self.tolerance)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]  # it optimizes by itself
        """Fits the head to all examples, whichever the batch."""
        optimizer: Any = self.optimizers()
        found = optimizer.step(lambda: joined_features(read_examples(self.trainer, self, self.head_features)))
        self.log("train/accuracy", found, prog_bar=True)


class LogisticRegression(Optimizer):
    """An optimizer whose one step fits rows of a linear map by logistic regression.

    Args:
        head: the map; its bias, if any, becomes 0 for these rows.
        cs, tolerance: see :class:`LogisticRegressionLM`.
    """

    def __init__(self, head: nn.Linear, cs: Sequence[float], tolerance: float) -> None:
        super().__init__([head.weight], {"cs": tuple(cs), "tolerance": tolerance})
        self._head = head

    def step(self, closure: Callable[[], tuple[Tensor, Tensor]]) -> float:  # type: ignore[override]
        """Fits the head to what the closure returns: features, (N, H), and the right row for each, (N,).

        Returns:
            The accuracy on these features.
        """
        features, rows = closure()
        cs, tolerance = (self.param_groups[0][name] for name in ("cs", "tolerance"))
        found = fit_probe(features, rows, cs, tolerance, most_accurate)
        set_rows(self._head, found.rows, found.weights)
        rank_zero_info(f"Linear probing: {found}")
        return found.accuracy
