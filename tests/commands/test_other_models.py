"""The subcommands on models that are no causal language models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from cli_runs import CONFIGS, printed
from masked_models import write_tiny

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]

SENTIMENT = CONFIGS.parent / "zolightning/data/sentiment"
SECOND = ["--scope", "DominantLayer", "--scope.layer", "1"]


def arguments(folder: Path, task: str, model: str, **more: Any) -> list[str]:
    """Of four steps on the packaged rows; the tiny model is in `folder`, and so are the logs."""
    settings = {
        "model.model_name": folder / "model",
        "data.path": SENTIMENT,
        "data.examples_per_class": 4,
        "data.num_test": 6,
        "data.max_length": 256,
        "data.batch_size": 4,
        "method.lr": 0.01,
        "trainer.precision": "32-true",
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": folder / "logs",
        **more,
    }
    files = [f"tasks/{task}", "methods/mezo", f"models/{model}"]
    return [
        *(part for file in files for part in ("--config", str(CONFIGS / f"{file}.yaml"))),
        *(part for name, value in settings.items() for part in (f"--{name}", str(value))),
    ]


def run_of(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a run, and the weights that it ended with."""
    run = next((folder / "logs").glob("*/version_0"))
    return run, torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_a_masked_model_is_trained_exported_and_predicts(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", words=[" terrible", " great"])
    output = printed(["fit", *arguments(tmp_path, "masked/sst2", "roberta_large"), *SECOND, "--test_last", "true"])
    assert "test/accuracy" in output
    run, trained = run_of(tmp_path)
    assert run.parent.name == "sst2-mezo-roberta_large"
    before = load_file(tmp_path / "model/model.safetensors")
    moved = {name for name, weight in before.items() if not weight.equal(trained[f"model.{name}"])}
    assert moved == {name for name in before if ".layer.1." in name}

    end = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    printed(["export", *end, "--folder", str(tmp_path / "exported")])
    printed(["predict", *end, "--predictions.path", str(tmp_path / "predictions.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["sentence"] for line in (SENTIMENT / "test.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "exported").eval()
    assert len(rows) == 6
    for row in rows:
        inputs = tokenizer(f"{texts[row['id']]} It was<mask>.", return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id][0]
        terrible, great = logits[tokenizer.convert_tokens_to_ids(["Ġterrible", "Ġgreat"])].tolist()
        assert row["scores"][1] - row["scores"][0] == pytest.approx(great - terrible, abs=1e-4)
        assert row["prediction"] == (great > terrible)


@pytest.mark.slow
def test_a_masked_model_is_resumed_and_replayed(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "half"):
        write_tiny(folder / "model", words=[" terrible", " great"])
    words = ["fit", *arguments(tmp_path, "masked/sst2", "roberta_large"), *SECOND]
    printed(words)
    run, trained = run_of(tmp_path)
    printed([*words, "--trainer.max_steps", "2", "--trainer.default_root_dir", str(tmp_path / "half/logs")])
    half, _ = run_of(tmp_path / "half")
    printed(["fit", "--config", str(half / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "4"])
    _, resumed = run_of(tmp_path / "half")
    assert all(weight.equal(trained[name]) for name, weight in resumed.items())

    ledger = ["--ledger", str(run / "ledger.bin"), "--output", str(tmp_path / "replayed")]
    said = printed(["replay", "--config", str(run / "config.yaml"), *ledger])
    assert "equal to the last bit" in said
    replayed = load_file(tmp_path / "replayed/model.safetensors")
    assert all(weight.equal(trained[f"model.{name}"]) for name, weight in replayed.items())


@pytest.mark.slow
def test_a_classifier_is_trained_and_predicts_after_its_export(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    words = arguments(tmp_path, "sst2", "roberta_base_classifier", **{"data.prompt": "{{ sentence }}"})
    printed(["fit", *words, "--method", "LOZO", "--method.lr", "0.01", "--evaluation.evaluations_per_forward", "2"])
    run, trained = run_of(tmp_path)
    before = load_file(tmp_path / "model/model.safetensors")
    assert not trained["model.roberta.encoder.layer.0.output.dense.weight"].equal(
        before["roberta.encoder.layer.0.output.dense.weight"]
    )
    end = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    printed(["export", *end, "--folder", str(tmp_path / "exported")])
    printed(["predict", *end, "--predictions.path", str(tmp_path / "predictions.jsonl")])
    texts = [json.loads(line)["sentence"] for line in (SENTIMENT / "test.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    for line in (tmp_path / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            logits = model(**tokenizer(texts[row["id"]], return_tensors="pt")).logits[0]
        assert row["scores"] == pytest.approx(logits.tolist(), abs=1e-4)
