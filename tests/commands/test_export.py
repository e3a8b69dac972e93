"""``zolightning export``: the model card, what repeats the run, and the hub, of which there is a fake here."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from cli_runs import Runs, parsed, printed
from zolightning.commands.export import export_model
from zolightning.commands.trainer import Trainer

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


class Hub:
    """Takes what HfApi is told to make and to upload."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: str = "") -> None:
        self.made: list[tuple[str, bool]] = []
        self.uploaded: dict[str, list[str]] = {}
        self.refuses = refuses
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        self.made.append((name, private))
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())


def test_the_card_says_what_the_run_did(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    runs("fit", "--trainer.max_steps", 2, "--trainer.val_check_interval", 1, "--test_last", "true")
    of_run = ["--config", str(runs.version(0) / "config.yaml"), "--ckpt_path", "best"]
    said = printed(["export", *of_run, "--folder", str(tmp_path / "mine"), "--push_to_hub", "somebody/mine"])
    assert f"exported: step 1, to {tmp_path / 'mine'}\n" in said

    metrics = runs.metrics(0)
    card = ModelCard.load(tmp_path / "mine/README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"zolightning", "zeroth-order", "MeZO"} <= set(data["tags"])
    assert "base_model" not in data  # a folder of this machine
    (entry,) = data["model-index"]
    values = {(r["dataset"]["split"], m["type"]): m["value"] for r in entry["results"] for m in r["metrics"]}
    for split, stage, of in (("validation", "val", metrics["best"]), ("test", "test", metrics["test"])):
        for metric in ("accuracy", "f1"):
            assert values[split, metric] == pytest.approx(of[f"{stage}/{metric}"])
    before, after = metrics["before_training"]["val/loss"], metrics["best"]["val/loss"]
    assert f"| val/loss | {before:.4g} | {after:.4g} |" in card.text
    assert f"after {metrics['best']['step']} steps" in card.text
    assert "| method | MeZO, lr 0.1" in card.text and "| forward passes, whole run | 4 |" in card.text
    assert f"torch {metrics['versions']['torch']}" in card.text
    assert str(runs.version(0)) not in card.text
    assert "\n`model`, fine-tuned on sentiment by MeZO" in card.text and f"`{runs.folder}" not in card.text

    settings = yaml.safe_load((tmp_path / "mine/training.yaml").read_text())
    again = parsed(["fit", "--config", str(tmp_path / "mine/training.yaml")]).fit
    assert again.trainer.max_steps == 2 and again.method.init_args.lr == 0.1 and again.data.init_args.num_train == 64
    assert str(runs.folder / "logs") not in json.dumps(settings)

    assert hub.made == [("somebody/mine", True)]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "training.yaml"} <= set(
        hub.uploaded["somebody/mine"]
    )


class Exported(L.LightningModule):
    def export(self, folder: Path) -> None:
        folder.mkdir()


def push(folder: Path, name: str) -> None:
    export_model(Trainer(logger=False), Exported(), None, None, folder, False, name, private=False, weights_only=True)


def test_a_hub_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, refuses="403 Forbidden\nmore of it")
    folder = tmp_path / "mine"
    message = f"The hub did not accept else/mine: 403 Forbidden. The model is in {folder}; to try again: hf upload"
    with pytest.raises(ValueError, match=re.escape(message)):
        push(folder, "else/mine")
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("name", "message"), [("a/b/c", "not a repository, owner/name"), ("a/b", "nobody is logged in")]
)
def test_what_cannot_be_pushed_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=message):
        push(tmp_path / "mine", name)
    assert not (tmp_path / "mine").exists()
