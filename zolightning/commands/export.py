"""``zolightning export``: from a checkpoint to a Hugging Face folder, and from there to the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.commands.configured_trainer import ConfiguredTrainer
from zolightning.commands.model_card import write_card
from zolightning.commands.output import require_new_folder
from zolightning.models.loading import refuse_other_weights
from zolightning.network.adapters import merge_adapter
from zolightning.network.quantization import refuse_quantized


def export_model(
    trainer: ConfiguredTrainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    ckpt_path: str | None,
    folder: Path,
    merge: bool,
    push_to_hub: str | None,
    private: bool,
    weights_only: bool,
) -> None:
    """Writes the model of a checkpoint, and its model card, to a new folder; uploads that if `push_to_hub` is given.

    Raises:
        ValueError: if `ckpt_path`, `folder`, `merge` or `push_to_hub` cannot be used, before anything is written; or
            if the hub does not accept the folder, with its reason.
    """
    require_new_folder("folder", folder)
    export = getattr(module, "export", None)
    if not callable(export):
        raise ValueError(f"{type(module).__name__} has no `export` method.")
    if ckpt_path is not None and not Path(ckpt_path).is_file():
        raise ValueError(f"`ckpt_path` is {ckpt_path}, which is not a file.")
    if push_to_hub is not None:
        _check_repository(push_to_hub)
    if ckpt_path is not None:
        checkpoint = AtomicCheckpointIO().load_checkpoint(ckpt_path, weights_only=weights_only)
        _load(module, checkpoint)
    if merge:
        refuse_quantized(module, "`merge`")
        merge_adapter(module.model)  # type: ignore[arg-type]  # modules that are exported have a network of that name
    export(folder)
    if ckpt_path is not None and getattr(module, "model", None) is not None:
        run_folder = Path(ckpt_path).absolute().parent.parent
        write_card(folder, module, datamodule, trainer.run_config, run_folder, checkpoint["global_step"])
    what = "the pretrained weights" if ckpt_path is None else f"step {checkpoint['global_step']}"
    print(f"exported: {what}, to {folder}")
    if push_to_hub is not None:
        _upload(folder, push_to_hub, private)


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
        raise ValueError(f"`push_to_hub` is {name!r}, which is no repository, owner/name: {reason}") from None
    if get_token() is None:
        raise ValueError(
            f"`push_to_hub` is {name!r}, and nobody is logged in to the Hugging Face hub here: `hf auth login`, or the "
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
            f"The hub did not take {name}: {reason}. The model is in {folder}; to try again: hf upload {name} {folder}"
        ) from error
    print(f"uploaded to {repository}")
