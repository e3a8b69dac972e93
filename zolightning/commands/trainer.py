"""The Trainer of the command line: Lightning's, with the subcommands it lacks."""

from pathlib import Path
from typing import Literal

import lightning as L

from zolightning.callbacks import LearningRateProbe
from zolightning.commands.configured_trainer import ConfiguredTrainer
from zolightning.commands.doctor import examine
from zolightning.commands.export import export_model
from zolightning.commands.output import output_folder, quiet
from zolightning.commands.profile import LayerProfile
from zolightning.commands.replay import follow_run, replay_to_folder
from zolightning.commands.sweep_layers import LayerSweep
from zolightning.partners import callbacks_of


class Trainer(ConfiguredTrainer):
    """Lightning's Trainer, which can also examine runs, profile and compare layers, and export and replay models."""

    def profile(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        num_prompts: int = 32,
        sensitivity_queries: int = 0,
        time_model: bool = False,
        probe_every: int = 0,
        layers_name: str | None = None,
        output: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Shows how large the outputs of each layer are, and which layer stands out.

        Prints a table, and which layer each rule selects; draws PNG files and the same figures for TensorBoard; and
        writes ``profile.json``, which the DominantLayer callback takes as its `profile`.

        Args:
            model: a module with recognisable layers, such as CausalLM.
            datamodule: whose first training prompts are read.
            num_prompts: training prompts to run.
            sensitivity_queries: directions a layer along which the loss is probed as well: 8 to 32 show which layer
                the loss feels most, in --trainer.precision 32-true; 0 probes nothing.
            time_model: also time steps that move more and more parameters, and fit what a parameter costs.
            probe_every: also fit linear probes to what the head would read after every so many layers, on all training
                examples: where they tell most of the task, `model.num_layers` may end the network; 0 fits none.
            layers_name: where the layers are, if they are not found: a dotted name or a regular expression.
            output: folder for the files; ``profile`` beside the versions of the run if not given.
            ckpt_path: not used, like the next; there because the config.yaml of a run has them.
            weights_only: not used.

        Raises:
            ValueError: naming the argument, its value and what is accepted.
        """
        profile = LayerProfile(num_prompts, sensitivity_queries, time_model, probe_every, layers_name)
        profile.run(self, model, datamodule, output_folder(self, output, "profile"))

    def doctor(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        num_steps: int = 8,
        num_examples: int = 32,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Says what a run would be, and what stands in its way, before it begins; trains and writes nothing.

        Takes the first steps of the run that the configuration describes, at a learning rate of 0, and prints for each
        kind of parameter the share of perturbations and of updates that survives rounding; how large the differences
        of losses are beside the rounding of a loss; the largest output; the time of a step, and memory; a range of
        learning rates (LearningRateProbe); and what to change.

        Args:
            model: any module that could be trained.
            datamodule: to train on.
            num_steps: steps to measure with, unless the run has a LearningRateProbe, which says so itself.
            num_examples: examples that learning rates are tried on, likewise; the default takes about 100 forwards.
            ckpt_path: not used, like the next; there because the config.yaml of a run has them.
            weights_only: not used.

        Raises:
            ValueError: naming the argument, its value and what is accepted.
            MisconfigurationException: if there is no `method`, the first loss is not finite, or the number of steps is
                not known.
        """
        examine(self, model, datamodule, LearningRateProbe(num_steps, num_examples))

    def sweep_layers(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        steps: int = 200,
        layers: list[int] | Literal["all"] = "all",
        first_order: bool = False,
        evaluate: Literal["validation", "test"] = "validation",
        layers_name: str | None = None,
        output: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Trains each layer alone from the same weights on the same batches, and compares what they learn.

        The method and all else but the number of steps come from the configuration. Each finished layer is a line of
        ``results.csv``; the same command again goes on where it was interrupted.

        Args:
            model: a module with recognisable layers, such as CausalLM.
            datamodule: to train and to evaluate on.
            steps: training steps of each layer.
            layers: indices of the layers to train, such as ``[0,1,5]``, or ``all``.
            first_order: train by backpropagation and the module's own optimizer instead of the zeroth-order method.
            evaluate: the split whose metrics are reported.
            layers_name: where the layers are, if they are not found: a dotted name or a regular expression.
            output: folder for results and plots; ``sweep-layers`` beside the versions of the run if not given.
            ckpt_path: not used, like the next; there because the config.yaml of a run has them.
            weights_only: not used.

        Raises:
            ValueError: naming the argument, its value and what is accepted.
        """
        folder = output_folder(self, output, "sweep-layers-first-order" if first_order else "sweep-layers")
        LayerSweep(self, model, datamodule, layers, steps, first_order, evaluate, layers_name, folder).run()

    def export(
        self,
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

        Of a run that trained adapters it is PEFT's folder of them. With a checkpoint come ``README.md``, the card, with
        method, settings and metrics of the run, and ``training.yaml``, the settings to repeat it by.

        Args:
            model: a module with an ``export`` method, such as CausalLM.
            datamodule: whose task the card names.
            ckpt_path: checkpoint of the run; without it the pretrained weights are written.
            folder: where to write config, weights and tokenizer; must not exist, or be empty.
            merge: add LoRA adapters to the weights beside them, and write the whole model.
            push_to_hub: repository of the Hugging Face hub, ``owner/name``, to upload the folder to, as who is logged
                in there (``hf auth login``); nothing is uploaded if not given.
            private: whether a repository that has to be made is private.
            weights_only: False to unpickle a checkpoint that holds more than tensors; only if you trust its source.

        Raises:
            ValueError: naming `ckpt_path`, `folder`, `merge` or `push_to_hub`.
        """
        only_tensors = weights_only is not False
        export_model(self, model, datamodule, ckpt_path, Path(folder), merge, push_to_hub, private, only_tensors)

    def replay(
        self,
        model: L.LightningModule,
        ledger: str,
        output: str | None = None,
        datamodule: L.LightningDataModule | None = None,
        step: int | None = None,
        follow: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Makes a fine-tuned model again from its base model and the run's ledger, and writes it as a folder.

        Neither data nor forward passes are needed. Where the run has ended, its weights are compared to the last bit.
        With `follow`, a run that trains in another process is validated at its newest step, again and again.

        Args:
            model: as the run had it before its first step, with an ``export`` method, such as CausalLM.
            ledger: the ``ledger.bin`` of the run.
            output: folder in which to write config, weights and tokenizer; must not exist, or be empty. Needed unless
                `follow` is given.
            datamodule: whose validation data `follow` reads.
            step: after which step of the run to stop; all of them if not given.
            follow: validate the newest step while the run goes on, print the metrics, and end when it ends.
            ckpt_path: not used, like the next; there because the config.yaml of a run has them.
            weights_only: not used.

        Raises:
            ValueError: naming what of `ledger`, `output` or `step` cannot be.
        """
        model.to(self.strategy.root_device)
        callbacks = callbacks_of(self)
        if not follow:
            replay_to_folder(model, callbacks, ledger, output, step)
            return
        if step is not None:
            raise ValueError(f"`step` is {step} and `follow` is given, which goes on to the last one. Leave one out.")
        silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        validator = self.with_settings(callbacks=[], enable_model_summary=False, **silent)

        def validate() -> list[dict[str, float]]:
            with quiet():
                found = validator.validate(model, datamodule, verbose=False)
            model.to(self.strategy.root_device)  # Lightning leaves it on the host
            return [dict(metrics) for metrics in found]

        follow_run(model, callbacks, ledger, output, validate)


# LightningCLI calls the method that has the name of the subcommand, and command lines join words by hyphens.
setattr(Trainer, "sweep-layers", Trainer.sweep_layers)
