"""Linear probing: the rows of a frozen model's head that stand for answers, fitted by logistic regression."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from zolightning.data.encoding import Batch
from zolightning.evaluation.mode import evaluation_mode
from zolightning.head import is_tied, untie_head
from zolightning.models.causal_lm import CausalLM
from zolightning.models.logistic_regression import choose_c, fit
from zolightning.models.scoring import last_logits
from zolightning.quantization import Quantization
from zolightning.scopes.calibration import calibration_batches

CS = tuple(10 ** (-4 + 8 * i / 9) for i in range(10))
"""Ten values from 1e-4 to 1e4, evenly spaced by their logarithms: scikit-learn's."""


class LinearProbe(CausalLM):
    """A causal language model of which one step fits the head, by logistic regression on all training examples.

    Features are what the head reads before each token of the right answers; classes are these tokens. Each class's row
    of the head becomes its weights; where the head is tied to the embeddings, it becomes a copy of them first. All else
    is frozen. As MeZO's ``--linear_probing`` (Malladi et al. 2023, arXiv:2305.17333), with scikit-learn's
    ``LogisticRegressionCV`` in place: no intercept, and the penalty that does best in five-fold cross-validation.

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
        if not cs or not all(c > 0 for c in cs):
            raise ValueError(f"`cs` must be at least one number above 0, got {cs!r}.")
        if not tolerance > 0:
            raise ValueError(f"`tolerance` must be above 0, got {tolerance!r}.")
        super().__init__(model_name, dtype=dtype, attention=attention, quantization=quantization)
        self.automatic_optimization = False
        self.cs = tuple(cs)
        self.tolerance = tolerance
        if is_tied(self.model):
            untie_head(self.model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter is self._head.weight)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.max_steps != 1:
            raise MisconfigurationException(
                f"`trainer.max_steps` is {self.trainer.max_steps}, and one step fits a LinearProbe: set it to 1."
            )
        super().setup(stage)

    def configure_optimizers(self) -> Any:
        return LogisticRegression(self._head, self.cs, self.tolerance)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]  # it optimizes by itself
        """Fits the head to all examples, whichever the batch."""
        optimizer: Any = self.optimizers()
        accuracy = optimizer.step(self._all_features)
        self.log("train/accuracy", accuracy, prog_bar=True)

    @torch.no_grad()
    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the head reads before each token of the right answers, (K, H), and these tokens, (K,)."""
        label = batch["label"]
        examples = torch.arange(len(label), device=label.device)
        answer = batch["answer_ids"][examples, label]  # (B, A), at the end of the row
        row = label if batch["input_ids"].shape[1] > 1 else torch.zeros_like(label)
        input_ids, attention_mask = (batch[name][examples, row] for name in ("input_ids", "attention_mask"))
        is_prompt = batch["input_ids"].shape[1] == 1 and answer.shape[1] == 1  # else the answer is in the row
        count = answer.shape[1] + (not is_prompt)
        read: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        try:
            last_logits(self.model, input_ids, attention_mask, count)
        finally:
            hook.remove()
        hidden = read[0][:, -count:][:, : answer.shape[1]]
        is_token = answer >= 0
        return hidden[is_token], answer[is_token]

    @property
    def _head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"`model_name` is a {type(self.model).__name__}, which has no head to probe.")
        return head

    def _all_features(self) -> tuple[Tensor, Tensor]:
        with evaluation_mode(self.model):
            found = [self.features(batch) for batch in calibration_batches(self.trainer, self, sys.maxsize)]
        features, tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
        return features, tokens


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
        # By the host in float64: it takes less than the forward passes, and says the same on every device.
        found, (classes, targets) = features.double().cpu(), rows.cpu().unique(return_inverse=True)
        cs, tolerance = (self.param_groups[0][name] for name in ("cs", "tolerance"))
        c = cs[0] if len(cs) == 1 else choose_c(found, targets, len(classes), cs, tolerance)
        weights = fit(found, targets, len(classes), c, tolerance)
        places = classes.to(self._head.weight.device)
        with torch.no_grad():
            self._head.weight[places] = weights.to(self._head.weight)
            if self._head.bias is not None:
                self._head.bias[places] = 0
        accuracy = ((found @ weights.T).argmax(dim=1) == targets).double().mean().item()
        rank_zero_info(
            f"Linear probing: {len(found):,} features of {found.shape[1]:,} numbers, {len(classes):,} classes, C "
            f"{c:.3g}; {100 * accuracy:.1f} % are fitted."
        )
        return accuracy
