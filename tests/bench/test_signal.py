"""Signal and noise of gradients, against gradients that autograd takes one example at a time."""

import csv
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from zolightning.bench.__main__ import main
from zolightning.bench.signal import PARTS, Signal, best_bias, measure, signals
from zolightning.data import PromptDataModule
from zolightning.models import CausalLM
from zolightning.models.scoring import answer_log_probs, candidate_scores
from zolightning.packaged import packaged


def test_sums_are_those_of_single_examples(write_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    module = CausalLM(str(write_tiny_model(tmp_path / "model")))
    data = PromptDataModule("sentiment", num_validation=2 * PARTS + 2, eval_batch_size=2, answers=["-", "+"])
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, limit_val_batches=1)
    trainer.validate(module, data, verbose=False)
    batches: list[Any] = list(data.val_dataloader())

    found, counts = measure(module, batches, with_bias=False)

    name = next(name for name in found if name.endswith("up_proj"))
    one, weight = found[name], module.get_parameter(f"{name}.weight").requires_grad_()
    gradients: list[list[torch.Tensor]] = [[] for _ in range(PARTS)]
    for number, batch in enumerate(batches):
        with torch.enable_grad():
            losses = F.cross_entropy(
                candidate_scores(*answer_log_probs(module.model, batch)), batch["label"], reduction="none"
            )
        gradients[number % PARTS] += [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
    assert counts == [*map(len, gradients)] == [4, 2, 2, 2]
    for kind, along in (("cores", lambda g: (g @ one.direction)[:, 0]), ("matrices", lambda g: g)):
        means = [torch.stack([along(gradient) for gradient in part]).mean(0) for part in gradients]
        products = [(first * second).sum().item() for first, second in combinations(means, 2)]
        squares = [along(gradient).square().sum().item() for part in gradients for gradient in part]
        signal = signals(one, counts)[kind]
        scale = sum(squares) / sum(counts)
        assert signal.signal == pytest.approx(sum(products) / len(products), rel=1e-3, abs=1e-4 * scale)
        assert signal.signal + signal.noise == pytest.approx(scale, rel=1e-3)


def test_the_bias_takes_out_what_all_prompts_share() -> None:
    scores, labels = torch.randn(40, 3) + torch.tensor([0.0, 3.0, -2.0]), torch.arange(40) % 3
    bias = best_bias(scores, labels)
    residuals = torch.softmax(scores + bias, -1) - F.one_hot(labels, 3)
    torch.testing.assert_close(residuals.mean(0), torch.zeros(3), rtol=0, atol=2e-3)


def test_numbers_of_a_line() -> None:
    record = Signal(2.0, 64.0).record("x", 16)  # a batch's noise is 4
    assert record["N / S"] == "32"
    assert float(record["progress"]) == pytest.approx(4 / (66 * 6), rel=1e-2)
    assert float(record["lr"]) == pytest.approx(2 / (66 * 6**0.5), rel=5e-2)
    assert Signal(-1.0, 5.0).record("x", 16)["progress"] == "0.00e+00"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 with jsonargparse 4.49
def test_command(write_tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = packaged("zolightning/data/sentiment")
    words = [
        "configs/tasks/sst2.yaml",
        f"data.path={rows}",
        "data.answers=[a,b]",
        f"model.model_name={write_tiny_model(tmp_path / 'model')}",
    ]
    output = tmp_path / "signal.csv"
    main(["signal", "--config", *words, "--patterns", "up_proj", "--examples", "8", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "8 examples, cores" in printed and "\nup_proj" in printed
    lines = list(csv.DictReader(output.read_text().splitlines()))
    assert {line["searched"] for line in lines} == {"cores", "matrices"}
    assert all(float(line["S"]) + float(line["N"]) > 0 for line in lines)
