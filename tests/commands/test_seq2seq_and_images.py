"""An encoder-decoder and an image classifier under the command line, from fit to export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from cli_runs import CONFIGS, printed, refused

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`update_precision`"),
    pytest.mark.usefixtures("fresh_process"),
]


def command(subcommand: str, folder: Path, files: list[str], *options: object) -> list[str]:
    overrides = {
        "--model.model_name": folder / "model",
        "--data.path": folder / "rows",
        "--data.batch_size": 4,
        "--data.num_train": 16,
        "--data.num_validation": 6,
        "--data.num_test": 6,
        "--trainer.max_steps": 4,
        "--trainer.val_check_interval": 2,
        "--trainer.log_every_n_steps": 1,
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
        "--trainer.default_root_dir": folder / "logs",
        "--validate_first": "false",
    }
    configs = [word for file in files for word in ("--config", CONFIGS / f"{file}.yaml")]
    return [subcommand, *map(str, [*configs, *(word for option in overrides.items() for word in option), *options])]


def weights_after(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def fit_and_replay(folder: Path, files: list[str], *options: object) -> Path:
    """Four steps, and the same weights by the ledger. The run's folder."""
    printed(command("fit", folder, files, *options))
    run = next((folder / "logs").glob("*/version_0"))
    config, ledger = str(run / "config.yaml"), str(run / "ledger.bin")
    said = printed(["replay", "--config", config, "--ledger", ledger, "--output", str(folder / "replayed")])
    assert "equal to the last bit to the weights the run ended with" in said
    return run


def test_an_encoder_decoder(tmp_path: Path, write_tiny_model: Callable[..., Path]) -> None:
    write_tiny_model(tmp_path / "model", "t5")
    (tmp_path / "rows").mkdir()
    for split in ("train", "validation", "test"):
        lines = [{"sentence": f"soup {number}", "label": number % 2} for number in range(16)]
        (tmp_path / f"rows/{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["tasks/sst2", "methods/zo_mopi", "models/t5_small"]
    scope = ["--scope", "TrainLayers", "--scope.layers", "[1]", "--evaluation.evaluations_per_forward", 2]
    options = ["--method.lr", 0.1, *scope, "--trainer.precision", "32-true"]
    whole = fit_and_replay(tmp_path, files, *options)
    trained = weights_after(whole)
    printed(command("fit", tmp_path, files, *options, "--trainer.max_steps", 2))
    cut = whole.with_name("version_1")
    printed(["fit", "--config", str(cut / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "4"])
    resumed = weights_after(cut)
    assert all(torch.equal(weight, resumed[name]) for name, weight in trained.items())

    before = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").state_dict()
    moved = {name for name, weight in before.items() if not torch.equal(weight, trained[f"model.{name}"])}
    assert moved and all(name.startswith("decoder.block.1.") for name in moved)

    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "replayed")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "replayed")
    words = ["--config", str(whole / "config.yaml"), "--ckpt_path", "last"]
    printed(["predict", *words, "--predictions.path", str(tmp_path / "predictions.jsonl")])
    for line in (tmp_path / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = torch.tensor([tokenizer(f"soup {row['id']} It was")["input_ids"]])
        scores = [-model(ids, labels=torch.tensor([tokenizer(a)["input_ids"]])).loss for a in ("terrible", "great")]
        assert row["scores"] == pytest.approx([score.item() for score in scores], rel=1e-4)

    half = refused(command("validate", tmp_path, files, "--trainer.precision", "16-true"))
    assert half.startswith("error: `model_name` is a T5ForConditionalGeneration, whose values float16 cannot hold")


def test_an_image_classifier(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    for number in range(48):
        path = tmp_path / "rows" / ("train", "validation", "test")[number % 3] / ("cat", "dog")[number % 2]
        path.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (5 * number, 0, 255)).save(path / f"{number:02}.png")
    files = ["tasks/images/cifar10", "methods/mezo", "models/vit_base"]
    task = {"name": "pets", "image": "image", "labels": ["cat", "dog"]}
    options = ["--data.task", json.dumps(task), "--model.num_classes", 2, "--method.lr", 0.01]
    whole = fit_and_replay(tmp_path, files, *options)

    words = ["--config", str(whole / "config.yaml"), "--ckpt_path", "last"]
    printed(["export", *words, "--folder", str(tmp_path / "exported")])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "exported")
    assert model.config.id2label == {0: "cat", 1: "dog"}
    replayed = AutoModelForImageClassification.from_pretrained(tmp_path / "replayed").state_dict()
    assert all(torch.equal(weight, replayed[name]) for name, weight in model.state_dict().items())
    code = (tmp_path / "exported/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    of_card: dict[str, Any] = {}
    exec(code.replace("FOLDER_OR_REPOSITORY", str(tmp_path / "exported")), of_card)
    processor = of_card["processor"]
    printed(["predict", *words, "--predictions.path", str(tmp_path / "predictions.jsonl")])
    images = sorted((tmp_path / "rows/test").glob("*/*"))
    for line in (tmp_path / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        inputs = processor(images=Image.open(images[row["id"]]), return_tensors="pt")
        assert row["scores"] == pytest.approx(model(**inputs).logits[0].tolist(), rel=1e-3, abs=1e-5)

    message = refused(command("validate", tmp_path, files, "--data.task", json.dumps(task)))
    assert message.startswith("error: The head of `model_name` has 10 classes, but the task 2: set `model.num_classes`")
