"""Two steps of ``zolightning fit`` with files of ``configs/``, on a tiny model and invented rows."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from zolightning.__main__ import main
from zolightning.data.classification import Classification
from zolightning.data.task_files import load_task
from zolightning.layers import find_layers, mlp_of

ROOT = Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


def names(folder: str) -> list[str]:
    return [Path(file).stem for file in FILES if Path(file).parent.name == folder]


# The architecture of each file in configs/models.
ARCHITECTURES = {
    "gemma3_270m": "gemma3_text",
    "gpt2": "gpt2",
    "llama3_8b": "llama",
    "mistral_7b": "mistral",
    "opt_1.3b": "opt",
    "opt_125m": "opt",
    "qwen3_0.6b": "qwen3",
    "smollm2_135m": "llama",
    "t5_small": "t5",
}

# An invented row of each task, with the fields that its data set has on the hub; the label goes through its values.
ROWS: dict[str, dict[str, Any]] = {
    "agnews": {"text": "The harbour reopened on Monday after the storm."},
    "boolq": {"question": "is the soup warm", "passage": "The soup came straight from the stove."},
    "cb": {"premise": "The cook thought that the soup was ready.", "hypothesis": "the soup was ready", "idx": 0},
    "copa": {
        "premise": "The soup boiled over.",
        "choice1": "The cook had left the room.",
        "choice2": "The table was set.",
        "question": "cause",
        "idx": 0,
    },
    "drop": {
        "passage": "Ada sold 3 boats, Ben 5.",
        "question": "How many?",
        "answers_spans": {"spans": ["8"], "types": ["number"]},
    },
    "imdb": {"text": "A boat.<br /><br />It sinks."},
    "countdown": {"numbers": "3 7 5", "target": 6, "solution": "3 * (7 - 5)"},
    "mr": {"text": "a warm and clever little soup ."},
    "record": {
        "passage": "Ada sold it.\n@highlight\nBen bought it",
        "query": "@placeholder has it",
        "entities": ["Ada", "Ben"],
        "answers": ["Ben"],
        "idx": {"passage": 0, "query": 0},
    },
    "squad": {
        "id": "0",
        "title": "Boats",
        "context": "The boat is red.",
        "question": "Which colour is it?",
        "answers": {"text": ["red"], "answer_start": [12]},
    },
    "sst5": {"text": "a warm and clever little soup", "label_text": "positive"},
    "mnli": {"premise": "The boat is red.", "hypothesis": "The boat has a colour.", "idx": 0},
    "multirc": {
        "paragraph": "Ada sold the boat to Ben.",
        "question": "Who has the boat now?",
        "answer": "Ben",
        "idx": {"paragraph": 0, "question": 0, "answer": 0},
    },
    "rte": {"premise": "The boat is red.", "hypothesis": "The boat has a colour.", "idx": 0},
    "sentiment": {"sentence": "a warm and clever little soup", "idx": 0},
    "snli": {"premise": "The boat is red.", "hypothesis": "The boat has a colour."},
    "sst2": {"sentence": "a warm and clever little soup ", "idx": 0},
    "trec": {"text": "How many boats are red ?", "fine_label": 0},
    "wic": {"word": "bank", "sentence1": "The bank lends.", "sentence2": "They sat on the bank.", "idx": 0},
    "wsc": {
        "text": "The cook told the guest that he was early.",
        "span1_index": 1,
        "span2_index": 6,
        "span1_text": "The cook",
        "span2_text": "he",
        "idx": 0,
    },
}

LR = "--method.lr"
# The method's rate for what has no subspace
VECTOR_LR = "--method.vector_lr"
SUBSPACE_METHODS = [name for name in names("methods") if name.startswith(("lozo", "sub", "zo_mu", "zo_mo"))]
for name in ("lozo_activations", "lozo_per_example"):  # which refuse a single channel: it has no subspace
    SUBSPACE_METHODS.remove(name)
SECOND = r"\.(layers|h)\.1\."  # the names of the second of two layers


def compose(*files: str) -> list[str]:
    return ["fit", *(part for file in files for part in ("--config", f"configs/{file}.yaml"))]


def write_rows(folder: Path, task: str) -> Path:
    """Writes rows of a task, one of each label or more, for each split."""
    definition, rows = load_task(task), [ROWS[task]] * 4
    if isinstance(definition, Classification):
        labels = [*definition.skip_labels, *definition.labels * 4]
        rows = [ROWS[task] | {definition.label: label} for label in labels]
    lines = [json.dumps(row) + "\n" for row in rows]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def plant_outlier(folder: Path, layer: int) -> None:
    """Makes the MLP of a layer put out one enormous number."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        mlp_of(find_layers(model).layers[layer]).down.weight[0, 0] = 1e3
    model.save_pretrained(folder)


def train(arguments: list[str], model: Path, lr: str) -> tuple[dict[str, Any], Path]:
    """Two steps on the rows beside the model, large enough to be seen in bfloat16; the last checkpoint."""
    folder = model.parent
    overrides = {
        "--model.init_args.model_name": model,
        "--model.init_args.dtype": "float32",
        "--data.init_args.path": folder,
        "--data.init_args.batch_size": 2,
        "--data.init_args.num_train": 4,
        "--data.init_args.num_validation": 2,
        "--data.init_args.num_test": 2,
        "--trainer.max_steps": 2,
        "--trainer.val_check_interval": 2,
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
        "--trainer.enable_model_summary": "false",
        "--trainer.logger": "false",
        "--trainer.default_root_dir": folder / "logs",
        "--checkpoint.dirpath": folder / "checkpoints",
        lr: 0.1,
        "--validate_first": "false",
    }
    if any(f"configs/methods/{method}.yaml" in arguments for method in SUBSPACE_METHODS):
        overrides[VECTOR_LR] = 0.1
    main([*arguments, *(str(part) for option in overrides.items() for part in option)])
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True), folder


def assert_only_moved(checkpoint: dict[str, Any], folder: Path, pattern: str) -> None:
    assert checkpoint["global_step"] == 2
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, after in checkpoint["state_dict"].items():
        initial = before.get(name.removeprefix("model.").replace(".base_layer", ""))
        if initial is not None:  # adapters have no values of their own before
            same = torch.equal(after.float(), initial.to(after.dtype).float())
            assert same == (re.search(pattern, name) is None), name
