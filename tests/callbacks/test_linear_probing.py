"""A fit that begins at a linear probe: what it sets, what stays, and what a resumed or replayed run makes of it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from transformers import AutoTokenizer

from masked_models import write_tiny
from zolightning import CausalLM
from zolightning.callbacks import KeepLedger, LinearProbing, SaveLast, ZerothOrder
from zolightning.checkpoints.replay import replay
from zolightning.data import PromptDataModule
from zolightning.models import SequenceClassifier
from zolightning.network.logistic_regression import fit, fit_probe, strongest_penalty
from zolightning.optim import MeZO
from zolightning.scopes import LoRA, TrainHead, TrainLayers

METHOD = partial(MeZO, lr=1e-2)
CS = (1e-3, 0.1, 10.0)


@pytest.fixture
def model(tmp_path: Path, write_tiny_model: Callable[..., Path]) -> Callable[[], CausalLM]:
    folder = write_tiny_model(tmp_path / "model", "gpt2")  # whose head is tied
    return lambda: CausalLM(str(folder))


def data(**settings: Any) -> PromptDataModule:
    sizes: dict[str, Any] = {"num_train": 30, "num_validation": 8, "num_test": 8, "batch_size": 7}
    return PromptDataModule("sentiment", **sizes | settings)


def head_of(module: CausalLM) -> torch.Tensor:
    return module.model.get_output_embeddings().weight.detach().clone()


class Watch(L.Callback):
    """Keeps the head and the network's other weights as the first step finds them."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def test_the_first_step_finds_the_fitted_rows(
    model: Callable[[], CausalLM], make_trainer: Callable[..., L.Trainer]
) -> None:
    module, watch = model(), Watch()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    head = head_of(module)
    method = ZerothOrder(METHOD)
    trainer = make_trainer(
        max_steps=1, limit_val_batches=0, callbacks=[LinearProbing(24, CS, 1e-7), TrainLayers([1]), method, watch]
    )
    rows = data()
    trainer.fit(module, datamodule=rows)
    loader: Any = rows.train_dataloader()

    plain = model().eval()
    found = [plain.head_features(batch) for batch in loader.first_batches(24)]
    features, tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
    classes, targets = tokens.unique(return_inverse=True)
    c, _ = strongest_penalty(features.double(), targets, len(classes), CS, 1e-7)
    expected = head.index_copy(0, classes, fit(features.double(), targets, len(classes), c, 1e-8).float())
    torch.testing.assert_close(watch.weights.pop("model.lm_head.weight"), expected, rtol=1e-2, atol=1e-3)
    assert watch.weights.keys() == before.keys()  # the head was one with the embeddings, and these stay
    assert all(torch.equal(weight, before[name]) for name, weight in watch.weights.items())
    trained = {name for name, p in module.named_parameters() if not torch.equal(p, watch.weights.get(name, p))}
    assert trained and all(name.startswith("model.transformer.h.1.") for name in trained)
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["forward_passes"] == 4 + 2  # 24 rows in batches of 7, and the step's


def test_of_fits_as_good_the_least_sure_one_is_taken() -> None:
    """By the definition, fold for fold; noise beside one feature that tells the classes apart."""
    targets = torch.arange(100) % 2
    cs = [10.0**i for i in range(-4, 2)]
    out = [torch.arange(100) // 2 % 5 == i for i in range(5)]  # pairs of rows, one of each class
    best_ones, taken = [], []
    for _ in range(4):
        features = torch.cat([(2.0 * targets - 1)[:, None] + torch.randn(100, 1), torch.randn(100, 30)], 1).double()
        found = torch.stack(
            [
                torch.stack([F.cross_entropy(features[o] @ w.T, targets[o]) for o, w in zip(out, weights, strict=True)])
                for weights in ([fit(features[~o], targets[~o], 2, c, 1e-7) for o in out] for c in cs)
            ]
        )
        best = int(found.mean(1).argmin())
        limit = found[best].mean() + found[best].std() / 5**0.5
        best_ones.append(cs[best])
        taken.append(next(c for c, losses in zip(cs, found, strict=True) if losses.mean() <= limit))
        assert strongest_penalty(features, targets, 2, cs[::-1], 1e-7)[0] == taken[-1]
    assert sum(taken) < sum(best_ones)


def test_small_features_may_have_large_weights() -> None:
    """Those of norm 0.1 of two classes that hardly overlap: the default penalties go on to weak ones."""
    targets = torch.arange(100) % 2
    features = torch.stack([(2.0 * targets - 1) + torch.randn(100) / 3, torch.randn(100)], 1).double() / 10
    found = fit_probe(features, targets, LinearProbing().cs, 1e-4, strongest_penalty)
    assert found.c > 1 and found.accuracy > 0.95


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_run_goes_on_and_is_replayed_as_it_was(
    model: Callable[[], CausalLM],
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    monkeypatch: Any,
    precision: Any,
) -> None:
    """In one go, resumed from a checkpoint, resumed from the ledger alone, and replayed: the same bits."""

    def run(folder: Path, steps: int, ckpt_path: Path | None = None, **keep: Any) -> dict[str, torch.Tensor]:
        module = model()
        callbacks = [LinearProbing(cs=[1.0]), TrainHead(), ZerothOrder(METHOD), KeepLedger(folder, **keep)]
        options = {"limit_val_batches": 0, "enable_checkpointing": True, "precision": precision}
        trainer = make_trainer(max_steps=steps, callbacks=[*callbacks, SaveLast(folder)], **options)
        trainer.fit(module, datamodule=data(), ckpt_path=ckpt_path, weights_only=True)
        return {name: weight.clone() for name, weight in module.state_dict().items()}

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "stopped", 2)
    with monkeypatch.context() as patch:
        patch.setattr("zolightning.callbacks.linear_probing.fit_probe", None)  # which nobody calls a second time
        resumed = run(tmp_path / "stopped", 5, tmp_path / "stopped/last.ckpt")
        module = model()
        assert replay(tmp_path / "whole/ledger.bin", module, METHOD).sealed
    again = run(tmp_path / "again", 5, go_on=tmp_path / "stopped/ledger.bin")
    for weights in (resumed, module.state_dict(), again):
        assert weights.keys() == whole.keys()
        assert all(torch.equal(weight, whole[name]) for name, weight in weights.items())


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama", "llama that ends texts by its token for padding"])
def test_what_the_head_of_a_classifier_reads(
    architecture: str, tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    """Of each text, short or long: the head's last layer makes the module's own logits of it."""
    if architecture.startswith("llama"):
        from models.test_sequence_classifier import write_llama

        folder = write_llama(tmp_path)
        if architecture != "llama":  # transformers takes the token before, then
            AutoTokenizer.from_pretrained(folder, pad_token="</s>").save_pretrained(folder)
    else:
        folder = write_tiny(tmp_path, architecture, "AutoModelForSequenceClassification")
    module = SequenceClassifier(str(folder), num_classes=2)
    rows = PromptDataModule("sentiment", num_train=9, num_validation=2, num_test=2, batch_size=4)
    make_trainer(max_steps=1, limit_val_batches=0, callbacks=[ZerothOrder(METHOD)]).fit(module, rows)
    module.eval()
    for batch in rows.train_dataloader():
        features, labels = module.head_features(batch)
        assert torch.equal(labels, batch["label"])
        torch.testing.assert_close(module.head(features), module.logits(batch))


def test_what_is_refused(
    model: Callable[[], CausalLM], make_trainer: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="`num_examples` must be an integer, at least 1, got 0"):
        LinearProbing(0)
    with pytest.raises(ValueError, match="`cs` must be at least one number above 0, got"):
        LinearProbing(cs=[0.0])

    callbacks = [LinearProbing(cs=[1.0]), TrainLayers([0], part=LoRA(rank=2)), ZerothOrder(METHOD)]
    with pytest.raises(MisconfigurationException, match="has an adapter, with which no head is saved"):
        make_trainer(max_steps=1, callbacks=callbacks).fit(model(), datamodule=data())
    callbacks = [LinearProbing(cs=[1.0]), ZerothOrder(METHOD)]
    monkeypatch.setattr("zolightning.callbacks.linear_probing._MOST_ROWS", 8)  # letters of good and bad: 9
    with pytest.raises(MisconfigurationException, match="are 9 different tokens: at most 8 classes are accepted"):
        make_trainer(max_steps=1, callbacks=callbacks).fit(model(), datamodule=data())
    sharding: Any = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match="is ModelParallelStrategy, under which no rank holds"):
        LinearProbing().check(sharding, model())
    with pytest.raises(MisconfigurationException, match=r"needs a module with `head_features`, .* got BoringModel"):
        make_trainer(max_steps=1, callbacks=[LinearProbing()]).fit(BoringModel())


def test_ranks_begin_alike(model: Callable[[], CausalLM], make_trainer: Callable[..., L.Trainer]) -> None:
    """The rows are the first rank's: under a strategy that hands out others, these are set."""

    class Other(SingleDeviceStrategy):
        def broadcast(self, obj: Any, src: int = 0) -> Any:
            return obj._replace(weights=torch.zeros_like(obj.weights)) if hasattr(obj, "num_features") else obj

    module, watch = model(), Watch()
    callbacks = [LinearProbing(cs=[1.0]), ZerothOrder(METHOD), watch]
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=callbacks, strategy=Other("cpu"))
    trainer.fit(module, datamodule=data())
    assert (watch.weights["model.lm_head.weight"] == 0).all(dim=1).sum() > 1
