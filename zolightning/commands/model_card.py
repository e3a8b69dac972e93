"""The model card of an exported model: a README.md that the Hugging Face hub reads, and the settings to repeat it."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import yaml

from zolightning.commands.metrics_files import library_versions
from zolightning.commands.run_folder import PLACES, Run, read_run

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

SETTINGS = "training.yaml"
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForConditionalGeneration": "text2text-generation",
}
_METRICS = ("accuracy", "f1", "exact_match")  # that have these names on the hub too
_OF_A_MACHINE = ("folder", "resume", "curves")
_OF_AN_EXPORT = ("ckpt_path", "config", "folder", "merge", "push_to_hub", "private", "weights_only")
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ base }}, fine-tuned {{ on }}by {{ method }} with zolightning.

```python
{{ usage }}
```
{% if results %}
## Results

| metric | before training | after {{ step }} steps |
|---|---|---|
{% for metric, before, after in results -%}
| {{ metric }} | {{ before }} | {{ after }} |
{% endfor %}{% endif %}
## Training

| | |
|---|---|
{% for key, value in facts -%}
| {{ key }} | {{ value }} |
{% endfor %}
[{{ settings }}]({{ settings }}) has all settings, and repeats the run:

```bash
zolightning fit --config {{ settings }}
```
{% for command in commands %}{% if loop.first %}
It was started by

```bash
{{ command }}
```
{% endif %}{% endfor %}
Libraries: {{ versions }}.
"""
_USAGE = {
    False: "from transformers import {auto}, {inputs}\n\n"
    'model = {auto}.from_pretrained("FOLDER_OR_REPOSITORY")\n'
    '{name} = {inputs}.from_pretrained("FOLDER_OR_REPOSITORY")',
    True: "from peft import PeftModel\nfrom transformers import {auto}\n\n"
    'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"{classes}), "FOLDER_OR_REPOSITORY")',
}


def write_card(
    folder: Path,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    config: Mapping[str, Any],
    run_folder: Path,
    step: int,
) -> None:
    """Writes ``README.md`` and ``training.yaml`` beside an exported model.

    Args:
        folder: the folder of the exported model.
        module: the exported module; its ``model`` is a network of transformers.
        datamodule: the data module of the run; if it has a ``task``, the card names it.
        config: the settings of the export command, used if the run has left none.
        run_folder: the folder of the training; if it is not the folder of a run, the card has no metrics.
        step: the step after which the exported weights were saved.
    """
    run = _run(run_folder)
    if run is not None:
        config = run.config
    settings = _without_places(config)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    card = _card(folder, module, getattr(datamodule, "task", None), settings, run, step)
    card.save(folder / "README.md")


def _card(
    folder: Path, module: L.LightningModule, task: Any, settings: Mapping[str, Any], run: Run | None, step: int
) -> "ModelCard":
    from huggingface_hub import ModelCard, ModelCardData

    network: Any = module.model
    base = str(((settings.get("model") or {}).get("init_args") or {}).get("model_name") or network.name_or_path)
    is_adapter = (folder / "adapter_config.json").is_file()
    method = _class_of(settings.get("method"))
    results = _results(run, step)
    kind = next((kind for kind in _PIPELINES if type(network).__name__.endswith(kind)), None)
    pipeline = None if kind is None else _PIPELINES[kind]
    is_on_hub = _is_hub_id(base)
    hub = getattr(task, "hub", None)
    card_data = ModelCardData(
        base_model=base if is_on_hub else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if is_on_hub else None,
        datasets=None if hub is None else [hub.path],
        eval_results=_eval_results(results, task, pipeline) or None,
        library_name="peft" if is_adapter else "transformers",
        model_name=folder.name,
        pipeline_tag=pipeline,
        tags=["zolightning", *(["zeroth-order", method] if method else [])],
    )
    auto = "AutoModelForSeq2SeqLM" if kind == "ForConditionalGeneration" else f"AutoModel{kind or ''}"
    inputs = getattr(module, "preprocessor_class", "AutoTokenizer")
    return ModelCard.from_template(
        card_data,
        template_str=_TEMPLATE,
        name=folder.name,
        base=f"[{base}](https://huggingface.co/{base})" if is_on_hub else f"`{_own_name(base)}`",
        on="" if task is None else f"on {task.name} ",
        method=f"{method}, a zeroth-order method: forward passes only," if method else "backpropagation",
        usage=_USAGE[is_adapter].format(
            auto=auto,
            inputs=inputs,
            name="tokenizer" if inputs == "AutoTokenizer" else "processor",
            base=base if is_on_hub else "ITS_BASE_MODEL",
            classes=f", num_labels={network.config.num_labels}" if auto.endswith("Classification") else "",
        ),
        results=[(name, _text(before), _text(after)) for name, (before, after) in results.items()],
        step=step,
        facts=[(key, _text(value)) for key, value in _facts(run)],
        settings=SETTINGS,
        commands=[] if run is None else run.commands,
        versions=", ".join(f"{name} {version}" for name, version in library_versions().items()),
    )


def _run(folder: Path) -> Run | None:
    try:
        return read_run(folder)
    except ValueError:  # a checkpoint that lies somewhere else
        return None


def _results(run: Run | None, step: int) -> dict[str, tuple[float | None, float | None]]:
    """By metric its values before training and after `step`; those of a test belong to the best checkpoint."""
    if run is None:
        return {}
    found = {name: (run.at(name, 0), run.at(name, step)) for name in run.metrics}
    if run.best is None or run.best.step == step:
        found |= {name: (None, value) for name, value in run.test.items()}
    return {name: values for name, values in found.items() if values[1] is not None}


def _eval_results(
    results: Mapping[str, tuple[float | None, float | None]], task: Any, pipeline: str | None
) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    hub = getattr(task, "hub", None)
    return [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=getattr(task, "name", "custom") if hub is None else hub.path,
            dataset_name=getattr(task, "name", "custom"),
            dataset_config=None if hub is None else hub.name,
            dataset_split={"val": "validation"}.get(stage, stage) if hub is None or stage == "val" else hub.test,
            metric_type=metric,
            metric_value=value,
        )
        for name, (_, value) in results.items()
        for stage, _, metric in [name.partition("/")]
        if metric in _METRICS
    ]


def _facts(run: Run | None) -> list[tuple[str, Any]]:
    """The run's overview and its costs, as pairs for a table."""
    facts: list[tuple[str, Any]] = []
    if run is not None:
        facts += [(name, value) for name, value in run.overview.items() if name not in _OF_A_MACHINE]
        spent = {"forward passes": run.spent.forward_passes, "seconds": run.spent.seconds}
        spent |= {"peak memory, GiB": run.peak_memory_gib}
        facts += [(f"{name}, whole run", value) for name, value in spent.items() if value is not None]
    return facts


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, without the folders of its files and the options of the export command."""
    settings = {key: deepcopy(value) for key, value in config.items() if key not in _OF_AN_EXPORT}
    for place in PLACES:
        field, _, key = place.partition(".")
        (settings.get(field) or {}).pop(key, None)
    return settings


def _class_of(setting: Any) -> str | None:
    return str(setting["class_path"]).rpartition(".")[2] if isinstance(setting, Mapping) else None


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _own_name(model: str) -> str:
    """Of a folder or file its own name: the rest of its path describes a machine, and helps nobody."""
    return Path(model).resolve().name if "/" in model and Path(model).exists() else model


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
