"""Linear probing as a baseline: logistic regression on what the head reads, and what becomes of the head."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    MiniCPM3Config,
    PreTrainedConfig,
)

from cli_runs import CONFIGS, Runs
from zolightning import CausalLM
from zolightning.data import PromptDataModule
from zolightning.data.batch import collate
from zolightning.data.encoding import Example
from zolightning.data.task_files import load_task
from zolightning.models import LogisticRegressionLM
from zolightning.models.head_features import answer_features
from zolightning.network.logistic_regression import fit, most_accurate

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 37}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}
HEADS = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SCALED = [
    GraniteConfig(logits_scaling=8, **SIZES),
    CohereConfig(logit_scale=0.25, **SIZES),
    FalconH1Config(lm_head_multiplier=0.5, num_key_value_heads=2, **MAMBA, **SIZES),
    HyperCLOVAXConfig(logits_scaling=0.5, **SIZES),
    MiniCPM3Config(dim_model_base=4, q_lora_rank=8, kv_lora_rank=8, **HEADS, **SIZES),  # before its head
]


def test_a_fit_is_where_the_gradient_vanishes() -> None:
    features, targets = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    for c in (0.01, 1.0, 100.0):
        weights = fit(features, targets, 3, c, tolerance=1e-9).numpy()
        x, y = features.numpy(), np.eye(3)[targets]
        odds = np.exp(x @ weights.T)
        # that of scikit-learn's objective, C * sum(cross-entropy) + |W|^2 / 2
        gradient = c * (odds / odds.sum(1, keepdims=True) - y).T @ x + weights
        assert np.abs(gradient).max() < 1e-6 * max(c, 1)


def test_the_penalty_is_chosen_by_folds_left_out() -> None:
    """One feature tells the classes, many are noise: the weakest penalty fits these rows best, others not."""
    targets = torch.arange(50) % 2
    features = torch.cat([(2.0 * targets - 1)[:, None] + torch.randn(50, 1), 3 * torch.randn(50, 60)], 1).double()
    cs = (1e-6, 1e-2, 1e4)

    def accuracy(c: float) -> float:
        right = 0
        for fold in range(5):  # rows 0 and 1 are the first of each class, so dealing them in turn deals pairs
            is_out = torch.arange(50) // 2 % 5 == fold
            weights = fit(features[~is_out], targets[~is_out], 2, c, 1e-6)
            right += int(((features[is_out] @ weights.T).argmax(1) == targets[is_out]).sum())
        return right / 50

    assert most_accurate(features, targets, 2, cs, 1e-6)[0] == max(cs, key=accuracy)


@pytest.fixture
def folder(tmp_path: Path, write_tiny_model: Callable[..., Path]) -> Path:
    for split in ("train", "test"):
        lines = [f'{{"sentence": "{"aA"[i % 2]} soup number {i} {"bB"[i % 2]}", "label": {i % 2}}}' for i in range(40)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    write_tiny_model(tmp_path / "model", "gpt2")  # whose head is tied
    return tmp_path


def data(folder: Path, **settings: Any) -> PromptDataModule:
    sizes = {"num_train": 24, "num_validation": 12, "num_test": 8, "batch_size": 5}
    return PromptDataModule(**{"task": "sst2", "path": str(folder)} | sizes | settings)


@pytest.mark.parametrize("objective", ["classification", "language_modeling"])
def test_the_rows_of_answers_are_fitted(objective: str, folder: Path, make_trainer: Callable[..., L.Trainer]) -> None:
    before = AutoModelForCausalLM.from_pretrained(folder / "model").lm_head.weight.detach()
    model = LogisticRegressionLM(str(folder / "model"), attention="eager", cs=[1.0], tolerance=1e-6)
    assert model.model.config._attn_implementation == "eager"
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.lm_head.weight"]
    rows = data(folder, task=asdict(load_task("sst2")) | {"objective": objective})
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model, datamodule=rows)
    assert trainer.global_step == 1
    head = model.model.lm_head.weight.detach()
    moved = {index for index in range(len(head)) if not torch.equal(head[index], before[index])}
    answers = {model.tokenizer(text)["input_ids"][0] for text in ("terrible", "great")}
    spoken = {i for text in (" terrible", " great") for i in model.tokenizer(text)["input_ids"]}
    assert moved == spoken >= answers  # bytes: answers are many tokens long
    assert torch.equal(model.model.transformer.wte.weight, before)

    model.eval()
    batches = list(rows.train_dataloader().first_batches(24))  # 24 is no multiple of the batch size
    read = [model.head_features(batch) for batch in batches]
    features, tokens = (torch.cat(parts) for parts in zip(*read, strict=True))
    classes, targets = tokens.unique(return_inverse=True)
    expected = fit(features.double(), targets, len(classes), c=1.0, tolerance=1e-8)
    torch.testing.assert_close(head[classes], expected.float(), rtol=1e-3, atol=1e-4)
    accuracy = (features @ head[classes].T).argmax(1).eq(targets).float().mean().item()
    assert 0 < accuracy < 1 and trainer.logged_metrics["train/accuracy"] == pytest.approx(accuracy)
    make_trainer(limit_test_batches=1).test(model, rows, verbose=False)  # whatever its number of steps
    batch = next(iter(rows.train_dataloader()))
    features, tokens = model.head_features(batch)
    # the features are what the module's own forward pass reads
    log_probs, mask = model.answer_log_probs(batch)
    gold = torch.arange(len(batch["label"])), batch["label"]
    right = torch.log_softmax(features @ head.T, -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(right, log_probs[gold][mask[gold]], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("config", SCALED)
def test_features_are_scaled_as_the_network_scales_its_logits(config: PreTrainedConfig) -> None:
    """Else fitted rows would say what they were fitted to say only up to a factor."""
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts, answers = [[5, 9, 3], [7, 2, 8]], [[4], [6]]
    examples = [Example(i, prompt, answers, label=i, text="") for i, prompt in enumerate(prompts)]
    head = model.get_output_embeddings()
    features, tokens = answer_features(model, head, collate(examples, 1, "classification"))
    assert tokens.tolist() == [4, 6]
    torch.testing.assert_close(features @ head.weight.T, model(torch.tensor(prompts)).logits[:, -1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 calls what jsonargparse 4.49 deprecates
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_the_command_fits_and_a_causal_model_is_exported(folder: Path, make_trainer: Callable[..., L.Trainer]) -> None:
    runs = Runs(folder)
    once = ("--trainer.max_steps", 1, "--trainer.val_check_interval", 1, "--validate_first", "false")
    runs("fit", "--config", CONFIGS / "scopes/logistic_regression.yaml", *once, "--model.cs", "[1.0]", method=None)
    (best,) = (folder / "logs").rglob("best-step=1.ckpt")
    metrics = ("val/accuracy", "val/loss")
    checkpoint = torch.load(best, weights_only=True)
    (score,) = (state["best_model_score"] for name, state in checkpoint["callbacks"].items() if "ModelCheck" in name)
    rows = PromptDataModule("sentiment", num_train=64, num_validation=20, num_test=10, batch_size=8)

    plain = CausalLM(str(folder / "model"))
    plain.on_load_checkpoint(checkpoint)
    plain.load_state_dict(checkpoint["state_dict"])
    (found,) = make_trainer().validate(plain, rows, verbose=False)
    assert found["val/accuracy"] == pytest.approx(score.item())
    plain.export(folder / "export")
    exported = CausalLM(str(folder / "export"))
    assert not exported.model.config.tie_word_embeddings
    (again,) = make_trainer().validate(exported, rows, verbose=False)
    assert {name: again[name] for name in metrics} == {name: found[name] for name in metrics}


def test_what_is_refused(folder: Path, make_trainer: Callable[..., L.Trainer]) -> None:
    make = partial(LogisticRegressionLM, str(folder / "model"))
    with pytest.raises(ValueError, match="`cs` must be at least one number above 0, got"):
        make(cs=[])
    with pytest.raises(ValueError, match="`tolerance` must be a positive number, got 0"):
        make(tolerance=0)
    with pytest.raises(
        MisconfigurationException, match=r"`trainer.max_steps` is 2, but LogisticRegressionLM is fitted in one step"
    ):
        make_trainer(max_steps=2).fit(make(), datamodule=data(folder))
