"""``zolightning profile``: what the layers of a pretrained model look like before any training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from tqdm import tqdm

from zolightning.callbacks.linear_probing import require_few_classes, require_probed
from zolightning.commands.configured_trainer import ConfiguredTrainer
from zolightning.commands.layer_probes import LayerProbes, probe_layers
from zolightning.commands.output import quiet
from zolightning.commands.plots import (
    activation_figure,
    probe_figure,
    save_figure,
    sensitivity_figure,
    step_time_figure,
)
from zolightning.commands.sensitivity import Sensitivity, scan_sensitivity
from zolightning.commands.tables import print_table
from zolightning.commands.time_model import StepTimes, growing_parts, measure_step_times
from zolightning.commands.timing import round_robin
from zolightning.layers import find_layers
from zolightning.messages import counted, rough_duration
from zolightning.network.early_exit import at_each_exit
from zolightning.network.logistic_regression import joined_features
from zolightning.network.quantization import refuse_quantized
from zolightning.scopes.activation_profile import ActivationProfile, profile_activations
from zolightning.scopes.calibration import calibration_batches, calibration_forward, read_examples
from zolightning.scopes.rules import DEFAULT_RULES

_TIMED_STEPS = 3  # for each scope, after one that is not timed
_FINDING_READS = 3  # forwards by which a method finds out where parameters are read


@dataclass(frozen=True)
class LayerProfile:
    """Profiles the layers of a model on the first training prompts, and writes tables, plots and JSON.

    Args:
        num_prompts: training prompts to run.
        sensitivity_queries: directions a layer along which the loss of one batch is probed; 0 for no probing.
        time_model: whether to time steps of scopes of different sizes, on one batch.
        probe_every: linear probes of what the head would read after this many layers, after twice as many and so on, on
            all training examples; 0 for none. Says where the network may end: `model.num_layers`.
        layers_name: where the layers are, see :func:`~zolightning.layers.find_layers`.

    Raises:
        ValueError: naming an argument, its value and what is accepted.
    """

    num_prompts: int = 32
    sensitivity_queries: int = 0
    time_model: bool = False
    probe_every: int = 0
    layers_name: str | None = None

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"`num_prompts` must be at least 1, got {self.num_prompts}.")
        if self.sensitivity_queries < 0:
            raise ValueError(f"`sensitivity_queries` must be 0 for no scan, or more, got {self.sensitivity_queries}.")
        if self.probe_every < 0:
            raise ValueError(f"`probe_every` must be 0 for no probes, or more, got {self.probe_every}.")

    def run(
        self,
        trainer: ConfiguredTrainer,
        module: L.LightningModule,
        datamodule: L.LightningDataModule | None,
        folder: Path,
    ) -> None:
        """Profiles `module` on one device, in the precision of `trainer`; files go to `folder`."""
        find_layers(module, self.layers_name)
        if self.probe_every:
            require_probed(module, "`probe_every`")
        if self.sensitivity_queries or self.time_model:
            refuse_quantized(module, "`sensitivity_queries` or `time_model`")

        def look(runner: L.Trainer) -> None:
            with runner.precision_plugin.forward_context():
                self._look(runner, module, folder, show_progress=trainer.progress_bar_callback is not None)

        # A fit that ends before its first step: it prepares data, device and precision as any other does.
        with quiet():
            runner = trainer.without_traces(callbacks=[_OnceReady(look)], max_epochs=-1, limit_train_batches=0)
            runner.fit(module, datamodule)
        print(f"\nwritten to {folder}")

    def _look(self, runner: L.Trainer, module: L.LightningModule, folder: Path, show_progress: bool) -> None:
        stack = find_layers(module, self.layers_name)
        batches = [
            runner.precision_plugin.convert_input(batch)
            for batch in calibration_batches(runner, module, self.num_prompts)
        ]

        def evaluate() -> Tensor:
            output: Any = calibration_forward(module, batches[0])
            return output["loss"] if isinstance(output, Mapping) else output

        def progress(what: str, total: int | None) -> "tqdm[Any]":
            return tqdm(desc=what, total=total, disable=not show_progress, leave=False)

        chosen = growing_parts(module, stack) if self.time_model else {}
        self._announce(evaluate, len(batches), len(stack), len(chosen))
        with progress("activations", len(batches)) as bar:
            profile = profile_activations(module, _counted(batches, bar), stack)
        selected = _report_activations(profile, folder)
        if self.sensitivity_queries:
            with progress("sensitivity", 1 + 2 * self.sensitivity_queries * len(stack)) as bar:
                probe = _counting(evaluate, bar)
                sensitivity = scan_sensitivity(stack, probe, self.sensitivity_queries)
            _report_sensitivity(sensitivity, selected, folder)
        if self.time_model:
            with progress("step times", (_TIMED_STEPS + 1) * (1 + len(chosen))) as bar:
                times = measure_step_times(module, chosen, evaluate, _TIMED_STEPS, on_step=bar.update)
            _report_step_times(times, folder)
        if self.probe_every:
            counts = range(len(stack), 0, -self.probe_every)[::-1]
            with progress("features", None) as bar:
                features = _features(runner, module, counts, on_batch=bar.update)
            with progress("linear probes", len(counts)) as bar:
                probes = probe_layers(features, on_probe=bar.update)
            _report_probes(probes, folder)

    def _announce(self, evaluate: Callable[[], Tensor], batches: int, layers: int, scopes: int) -> None:
        """Says how long the rest will take, from one forward."""
        seconds = min(round_robin({"": evaluate}, 2)[""])
        forwards = batches
        if self.sensitivity_queries:
            forwards += 1 + (2 * self.sensitivity_queries + _FINDING_READS) * layers
        if scopes:
            forwards += (_TIMED_STEPS + 1) * (1 + 2 * scopes) + _FINDING_READS * scopes
        print(f"{forwards} forwards of {seconds:.2g} s to go: about {rough_duration(forwards * seconds)}", flush=True)


class _OnceReady(Callback):
    """Does something when data, device and precision are those of a fit, before any step."""

    def __init__(self, do: Callable[[L.Trainer], None]) -> None:
        self._do = do

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._do(trainer)


def _features(
    runner: L.Trainer, module: L.LightningModule, counts: Sequence[int], on_batch: Callable[[], object]
) -> dict[int, tuple[Tensor, Tensor]]:
    """The inputs of the head if the network ends after so many layers, on the host, and the head's right rows."""
    model: Any = module

    def read(batch: Any) -> list[tuple[Tensor, Tensor]]:
        found = at_each_exit(model.model, counts, lambda: model.head_features(batch))
        on_batch()
        return [(inputs.cpu(), rows.cpu()) for inputs, rows in found]

    by_count = zip(*read_examples(runner, module, read), strict=True)
    found = dict(zip(counts, map(joined_features, by_count), strict=True))
    require_few_classes(found[counts[0]][1])
    return found


def _report_activations(profile: ActivationProfile, folder: Path) -> int | None:
    """Returns the layer that DominantLayer would choose."""
    profile.save(folder / "profile.json")
    fingerprint = profile.fingerprint
    title = f"Outputs of {fingerprint.num_layers} x {fingerprint.layer_class} over {profile.num_prompts} sequences"
    print(f"\n{title}\n{profile.table()}\n")
    choices = {rule: rule(profile) for rule in DEFAULT_RULES}
    for rule, layer in choices.items():
        print(f"{rule}: {'no layer' if layer is None else f'layer {layer}'}")
    selected = next((layer for layer in choices.values() if layer is not None), None)
    if selected is None:
        print("No layer stands out: DominantLayer would ask for its `layer`, and a sweep shows which layers learn.")
    else:
        print(f"DominantLayer selects layer {selected}, the choice of the first rule that makes one.")
    save_figure(activation_figure(profile, selected, title), folder, "profile")
    return selected


def _report_sensitivity(sensitivity: Sensitivity, selected: int | None, folder: Path) -> None:
    sensitivity.save(folder / "sensitivity.json")
    title = "Loss of one batch when one layer is perturbed"
    print_table(title, [asdict(layer) for layer in sensitivity.layers])
    print(
        f"rms estimates the norm of the layer's gradient with a standard error of {sensitivity.relative_error:.0%}; "
        f"unperturbed loss {sensitivity.loss:.4f}"
    )
    if sensitivity.dtype in ("bfloat16", "float16"):
        print(
            f"The layers are in {sensitivity.dtype}, where rounding can move the loss more than the gradient does and "
            "all layers then look alike: repeat with --trainer.precision 32-true."
        )
    save_figure(sensitivity_figure(sensitivity, selected, title), folder, "sensitivity")


def _report_step_times(times: StepTimes, folder: Path) -> None:
    times.save(folder / "step_time.json")
    title = "Time of a two-sided step of one query"
    rows = [
        {
            "scope": step.scope,
            "parameters": f"{step.parameters:,}",
            "measured_seconds": step.seconds,
            "predicted_seconds": times.model.seconds(step.parameters),
            "times_faster_than_all": times.steps[-1].seconds / step.seconds,
        }
        for step in times.steps
    ]
    print_table(title, rows)
    print(
        f"T = 2 F + gamma |S|: F {times.model.forward:.3g} s ({times.forward:.3g} s timed alone), gamma "
        f"{times.model.per_parameter * 1e12:.3g} ps a parameter, R² {times.model.r_squared:.4f}"
    )
    save_figure(step_time_figure(times, title), folder, "step_time")


def _report_probes(probes: LayerProbes, folder: Path) -> None:
    probes.save(folder / "probes.json")
    title = "Linear probes after some of the layers, in five-fold cross-validation"
    print_table(title, [asdict(probe) for probe in probes.probes])
    best = probes.best.num_layers
    print(f"The least loss is after {counted(best, 'layer')}: --model.num_layers {best} --linear_probing LinearProbing")
    save_figure(probe_figure(probes, title), folder, "probes")


def _counted(batches: Sequence[Any], bar: "tqdm[Any]") -> Iterator[Any]:
    for batch in batches:
        yield batch
        bar.update()


def _counting(evaluate: Callable[[], Tensor], bar: "tqdm[Any]") -> Callable[[], Tensor]:
    def evaluated() -> Tensor:
        loss = evaluate()
        bar.update()
        return loss

    return evaluated
