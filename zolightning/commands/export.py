"""``zolightning export``: from a checkpoint to a Hugging Face folder, and from there to the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.commands.configured_trainer import ConfiguredTrainer
from zolightning.commands.model_card import write_card
from zolightning.commands.output_folder import require_new_folder
from zolightning.models.loading import refuse_other_weights
from zolightning.network.adapters import merge_adapter
from zolightning.network.quantization import refuse_quantized


def export_model(
    trainer: ConfiguredTrainer,
    model: L.LightningModule,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | None = None,
    folder: str = "exported",
    merge: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
    weights_only: bool | None = None,
) -> None:
    """Writes a fine-tuned model as a Hugging Face folder, with a model card, and uploads it on request.

    For a run that trained adapters, it is PEFT's folder of them. With a checkpoint there are also ``README.md``, the
    card, with method, costs and metrics of the run, and ``training.yaml``, all settings, to repeat the run.

    Args:
        trainer: the Trainer, which has the settings of the command line.
        model: a module with an ``export`` method, such as CausalLM.
        datamodule: the data, whose task the card names.
        ckpt_path: checkpoint of the run; without it the pretrained weights are written.
        folder: where to write config, weights and tokenizer; must not exist, or be empty.
        merge: merge LoRA adapters into the base weights, and write the whole model.
        push_to_hub: repository of the Hugging Face hub, ``owner/name``, to upload the folder to, as the user who is
            logged in (``hf auth login``); nothing is uploaded if not given.
        private: whether a repository that has to be made is private.
        weights_only: False to unpickle a checkpoint that holds more than tensors; only if you trust its source.

    Raises:
        ValueError: naming `ckpt_path`, `folder`, `merge` or `push_to_hub`, before anything is written; or with the
            hub's reason, if it does not accept the folder.
    """
    target = Path(folder)
    require_new_folder("folder", target)
    export = getattr(model, "export", None)
    if not callable(export):
        raise ValueError(f"{type(model).__name__} has no `export` method.")
    if ckpt_path is not None and not Path(ckpt_path).is_file():
        raise ValueError(f"`ckpt_path` is {ckpt_path}, which is not a file.")
    if push_to_hub is not None:
        _check_repository(push_to_hub)
    if ckpt_path is not None:
        checkpoint = AtomicCheckpointIO().load_checkpoint(ckpt_path, weights_only=weights_only is not False)
        _load(model, checkpoint)
    if merge:
        refuse_quantized(model, "`merge`")
        merge_adapter(model.model)  # type: ignore[arg-type]  # modules that are exported have a network of that name
    export(target)
    if ckpt_path is not None and getattr(model, "model", None) is not None:
        run_folder = Path(ckpt_path).absolute().parent.parent
        write_card(target, model, datamodule, trainer.run_config, run_folder, checkpoint["global_step"])
    what = "the pretrained weights" if ckpt_path is None else f"step {checkpoint['global_step']}"
    print(f"exported: {what}, to {target}")
    if push_to_hub is not None:
        _upload(target, push_to_hub, private)


def _load(module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Loads a checkpoint's weights in the dtypes that they have there."""
    module.on_load_checkpoint(dict(checkpoint))
    weights = checkpoint["state_dict"]
    refuse_other_weights(module, weights)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(weights[name].dtype)
    module.load_state_dict(weights)


def _check_repository(name: str) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"`push_to_hub` is {name!r}, which is not a repository, owner/name: {reason}") from None
    if get_token() is None:
        raise ValueError(
            f"`push_to_hub` is {name!r}, but nobody is logged in to the Hugging Face hub here: `hf auth login`, or the "
            "variable HF_TOKEN."
        )


def _upload(folder: Path, name: str, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Model by zolightning export")
    except Exception as error:  # of the hub or of the HTTP library, which depends on the version of the hub's client
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"The hub did not accept {name}: {reason}. The model is in {folder}; to try again: hf upload {name} "
            f"{folder}"
        ) from error
    print(f"uploaded to {repository}")
