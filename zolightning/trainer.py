"""The Trainer of the command line: Lightning's, with the subcommands it lacks."""

from pathlib import Path

import lightning as L
import torch


class Trainer(L.Trainer):
    """Lightning's Trainer, which can also export what it trained."""

    def export(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        folder: str = "exported",
        weights_only: bool | None = None,
    ) -> None:
        """Writes a fine-tuned model as a Hugging Face folder.

        Args:
            model: a module with an ``export`` method, such as CausalLM.
            datamodule: not used; there because every subcommand reads the same configuration.
            ckpt_path: checkpoint of the run; without it the pretrained weights are written.
            folder: where to write config, weights and tokenizer; must not exist, or be empty.
            weights_only: False to unpickle a checkpoint that holds more than tensors; only if you trust its source.

        Raises:
            ValueError: naming `ckpt_path` or `folder`.
        """
        target = Path(folder)
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"`folder` is {folder}, which is not empty. Name a new folder.")
        if not hasattr(model, "export"):
            raise ValueError(f"{type(model).__name__} has no `export` method.")
        if ckpt_path is not None:
            if not Path(ckpt_path).is_file():
                raise ValueError(f"`ckpt_path` is {ckpt_path}, which is not a file.")
            weights = torch.load(ckpt_path, map_location="cpu", weights_only=weights_only is not False)["state_dict"]
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(weights[name].dtype)
            model.load_state_dict(weights)
        model.export(target)
