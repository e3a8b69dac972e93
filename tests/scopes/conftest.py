"""Tiny random networks of seven architectures with an outlier planted in one layer, and prompts to run them on."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from training import Save
from zolightning import CausalLM
from zolightning.callbacks import ZerothOrder
from zolightning.data import PromptDataModule
from zolightning.optim import MeZO

VOCABULARY, LAYERS = 50, 6
HIDDEN, WIDTH = 16, 48

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,  # large, so that activations are about 1 and differ between tokens
}
_LLAMA_SIZES = _SIZES | {"intermediate_size": WIDTH, "num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_SIZES,
    "opt": _SIZES | {"ffn_dim": WIDTH, "word_embed_proj_dim": HIDDEN, "init_std": 0.3},
    "gpt2": _SIZES | {"n_inner": WIDTH},
    "qwen3": _LLAMA_SIZES,
    "gemma3_text": _LLAMA_SIZES,
    "mistral": _LLAMA_SIZES,
    "bert": _SIZES | {"intermediate_size": WIDTH},
}

# The tensor whose largest entry makes an outlier in the output of its layer. Where the layer normalizes what its MLP
# puts out, that is the gain of the norm.
PLANTED = {
    "llama": "mlp.down_proj.weight",
    "opt": "fc2.weight",
    "gpt2": "mlp.c_proj.weight",
    "qwen3": "mlp.down_proj.weight",
    "gemma3_text": "post_feedforward_layernorm.weight",
    "mistral": "mlp.down_proj.weight",
    "bert": "output.LayerNorm.weight",
}
STACKS = {"opt": "model.decoder.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}


class Classifier(L.LightningModule):
    """A network of transformers as a stranger would wrap it: the next token, or the class, of each prompt."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        mask = batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.network(batch["input_ids"], attention_mask=mask, position_ids=positions).logits
        if logits.ndim == 3:
            last = mask.shape[1] - 1 - mask.flip(-1).argmax(-1)
            logits = logits[torch.arange(len(last)), last]
        loss = F.cross_entropy(logits.float(), batch["label"])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


@pytest.fixture(params=CONFIGS)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_module() -> Callable[..., Classifier]:
    def make(architecture: str = "llama", outlier: int | None = None, **config: Any) -> Classifier:
        """A module whose layer `outlier` puts out one enormous channel."""
        family = AutoModelForSequenceClassification if architecture == "bert" else AutoModelForCausalLM
        with torch.random.fork_rng():
            torch.manual_seed(6)  # with it, the planted channels are active in most prompts
            network = family.from_config(AutoConfig.for_model(architecture, **CONFIGS[architecture] | config))
        if outlier is not None:
            stack = network.get_submodule(STACKS.get(architecture, "model.layers"))
            planted = stack[outlier].get_parameter(PLANTED[architecture])
            with torch.no_grad():
                entry = planted.view(-1)[planted.abs().argmax() :][:1]
                entry.copy_((1 + entry if architecture == "gemma3_text" else entry) * 1e4)
        return Classifier(network.train())

    return make


PROMPTS = [[0, *ids] for ids in ([5, 9, 3, 22], [2, 4], [7, 7, 8, 2, 40, 31], [12, 3, 4], [30, 2, 2, 19, 6], [8, 11])]


def collate(prompts: Sequence[tuple[list[int], int]], side: str = "left") -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in prompts)

    def pad(values: list[int], fill: int) -> list[int]:
        padding = [fill] * (width - len(values))
        return padding + values if side == "left" else values + padding

    return {
        "input_ids": torch.tensor([pad(ids, 1) for ids, _ in prompts]),
        "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _ in prompts]),
        "label": torch.tensor([label for _, label in prompts]),
    }


@pytest.fixture
def make_batches() -> Callable[..., list[dict[str, Tensor]]]:
    def make(size: int = 3, side: str = "left", order: Sequence[int] = range(len(PROMPTS))) -> list[dict[str, Tensor]]:
        labelled = [(PROMPTS[i], i % 2) for i in order]
        return [collate(labelled[start : start + size], side) for start in range(0, len(labelled), size)]

    return make


@pytest.fixture
def make_loader() -> Callable[..., DataLoader]:
    def make(repeats: int = 2, batch_size: int = 3, **options: Any) -> DataLoader:
        examples = [(ids, i % 2) for i, ids in enumerate(PROMPTS * repeats)]
        return DataLoader(examples, batch_size=batch_size, collate_fn=collate, **options)

    return make


@pytest.fixture
def fit(make_trainer: Callable[..., L.Trainer], make_loader: Callable[..., DataLoader]) -> Callable[..., L.Trainer]:
    def run(module: L.LightningModule, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> L.Trainer:
        trainer = make_trainer(**{"max_steps": 3, "callbacks": list(callbacks)} | options)
        trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
        return trainer

    return run


MEZO = partial(MeZO, lr=1e-2)


@pytest.fixture
def folder(tmp_path: Path, write_tiny_model: Callable[..., Path]) -> Path:
    for split in ("train", "test"):
        lines = [f'{{"sentence": "soup number {i}", "label": {i % 2}}}' for i in range(20)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    write_tiny_model(tmp_path / "model")
    return tmp_path


@pytest.fixture
def train(folder: Path, make_trainer: Callable[..., L.Trainer]) -> Callable[..., tuple[CausalLM, L.Trainer, Any]]:
    """Four steps on the model of the folder; the second one is saved as `two.ckpt`."""

    def run(
        *callbacks: Any,
        method: Any = MEZO,
        ckpt_path: Path | None = None,
        precision: str = "32-true",
        adapter: str | None = None,
    ) -> Any:
        trains = [] if method is None else [ZerothOrder(method)]
        model = CausalLM(str(folder / "model"), optimizer=partial(torch.optim.SGD, lr=0.1), adapter=adapter)
        data = PromptDataModule("sst2", path=str(folder), num_train=12, num_validation=4, num_test=8, batch_size=4)
        trainer = make_trainer(
            max_steps=4,
            max_epochs=-1,
            precision=precision,
            limit_val_batches=0,
            callbacks=[*callbacks, *trains, Save(2, folder / "two.ckpt")],
        )
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return model, trainer, data

    return run
