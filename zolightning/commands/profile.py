"""``zolightning profile``: what the layers of a pretrained model look like before any training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from tqdm import tqdm

from zolightning.callbacks.linear_probing import CS, TOLERANCE, require_few_classes, require_probed
from zolightning.checks import require_integer
from zolightning.commands.configured_trainer import ConfiguredTrainer
from zolightning.commands.metrics_files import as_json
from zolightning.commands.output_folder import output_folder
from zolightning.commands.plots import (
    activation_figure,
    probe_figure,
    save_figure,
    sensitivity_figure,
    step_time_figure,
)
from zolightning.commands.quiet import quiet
from zolightning.commands.sensitivity import Sensitivity, scan_sensitivity
from zolightning.commands.tables import print_table
from zolightning.commands.time_model import StepTimes, growing_parts, measure_step_times
from zolightning.commands.timing import round_robin
from zolightning.layers import find_layers
from zolightning.messages import counted, rough_duration
from zolightning.network.early_exit import at_each_exit
from zolightning.network.logistic_regression import CrossValidation, joined_features, strongest_penalty
from zolightning.network.quantization import refuse_quantized
from zolightning.scopes.activation_profile import ActivationProfile, profile_activations
from zolightning.scopes.calibration import calibration_batches, calibration_forward, read_examples
from zolightning.scopes.rules import DEFAULT_RULES

_TIMED_STEPS = 3  # for each scope, after one that is not timed
_FINDING_READS = 3  # forwards by which a method finds out where parameters are read


def profile_layers(
    trainer: ConfiguredTrainer,
    model: L.LightningModule,
    datamodule: L.LightningDataModule | None = None,
    num_prompts: int = 32,
    sensitivity_queries: int = 0,
    time_model: bool = False,
    probe_every: int = 0,
    layers_name: str | None = None,
    output: str | None = None,
) -> None:
    """Shows how large the outputs of each layer are, and which layer stands out.

    Prints a table, and which layer each rule selects; draws PNG files and the same figures for TensorBoard; and
    writes ``profile.json``, which the DominantLayer callback takes as its `profile`.

    Args:
        trainer: the Trainer whose precision and accelerator are used, on one device.
        model: a module with recognisable layers, such as CausalLM.
        datamodule: the data, whose first training prompts are read.
        num_prompts: training prompts to run.
        sensitivity_queries: directions a layer along which the loss is probed as well: 8 to 32 show to which layer the
            loss is most sensitive, in --trainer.precision 32-true; 0 probes nothing.
        time_model: also time steps that move more and more parameters, and fit what a parameter costs.
        probe_every: also fit linear probes to what the head would read after every so many layers; 0 fits none. All
            training examples are read. `model.num_layers` can end the network where probes do best.
        layers_name: where the layers are, if they are not found: a dotted name or a regular expression.
        output: folder for the files; ``profile`` beside the versions of the run if not given.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    require_integer("num_prompts", num_prompts)
    require_integer("sensitivity_queries", sensitivity_queries, least=0)
    require_integer("probe_every", probe_every, least=0)
    find_layers(model, layers_name)
    if probe_every:
        require_probed(model, "`probe_every`")
    if sensitivity_queries or time_model:
        refuse_quantized(model, "`sensitivity_queries` or `time_model`")
    folder = output_folder(trainer, output, "profile")
    progress = partial(tqdm, disable=trainer.progress_bar_callback is None, leave=False)

    def look(runner: L.Trainer, _: L.LightningModule) -> None:
        with runner.precision_plugin.forward_context():
            examples = calibration_batches(runner, model, num_prompts)
            batches = [runner.precision_plugin.convert_input(batch) for batch in examples]
            stack = find_layers(model, layers_name)
            parts = growing_parts(model, stack) if time_model else {}
            scan_forwards = (1 + (2 * sensitivity_queries + _FINDING_READS) * len(stack)) * bool(sensitivity_queries)
            timed_forwards = ((_TIMED_STEPS + 1) * (1 + 2 * len(parts)) + _FINDING_READS * len(parts)) * time_model
            _announce(len(batches) + scan_forwards + timed_forwards, partial(_loss, model, batches[0]))
            profile = profile_activations(model, progress(batches, desc="activations"), stack)
            selected = _report_activations(profile, folder)
            if sensitivity_queries:
                with progress(desc="sensitivity", total=scan_forwards) as bar:
                    sensitivity = scan_sensitivity(stack, partial(_loss, model, batches[0], bar), sensitivity_queries)
                _report_sensitivity(sensitivity, selected, folder)
            if time_model:
                with progress(desc="step times", total=timed_forwards) as bar:
                    times = measure_step_times(model, parts, partial(_loss, model, batches[0], bar), _TIMED_STEPS)
                _report_step_times(times, folder)
            if probe_every:
                counts = range(len(stack), 0, -probe_every)[::-1]
                with progress(desc="features") as bar:
                    features = _features(runner, model, counts, on_batch=bar.update)
                with_bar = progress(features.items(), desc="linear probes")
                _report_probes({count: _probed(*found) for count, found in with_bar}, folder)

    # A fit that ends before its first step: it prepares data, device and precision as any other does.
    with quiet():
        callbacks = [LambdaCallback(on_fit_start=look)]
        runner = trainer.without_traces(callbacks=callbacks, max_epochs=-1, limit_train_batches=0)
        runner.fit(model, datamodule)
    print(f"\nwritten to {folder}")


def _announce(forwards: int, evaluate: Callable[[], Tensor]) -> None:
    """Says how long some forwards will take, from two of them."""
    seconds = min(round_robin({"": evaluate}, 2)[""])
    print(f"{forwards} forwards of {seconds:.2g} s to go: about {rough_duration(forwards * seconds)}", flush=True)


def _loss(module: L.LightningModule, batch: Any, bar: "tqdm[Any] | None" = None) -> Tensor:
    """The loss of a batch, which counts on a progress bar."""
    output: Any = calibration_forward(module, batch)
    if bar is not None:
        bar.update()
    return output["loss"] if isinstance(output, Mapping) else output


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
    print(f"\n{title}: absolute values, and the channels and tokens of the largest\n{profile.table()}\n")
    choices = {rule: rule(profile) for rule in DEFAULT_RULES}
    for rule, layer in choices.items():
        print(f"{rule}: {'no layer' if layer is None else f'layer {layer}'}")
    selected = next((layer for layer in choices.values() if layer is not None), None)
    if selected is None:
        print("No layer stands out: DominantLayer would ask for its `layer`, and a sweep shows which layers learn.")
    else:
        print(f"DominantLayer selects layer {selected}, by the first rule that finds one.")
    save_figure(activation_figure(profile, selected, title), folder, "profile")
    return selected


def _report_sensitivity(sensitivity: Sensitivity, selected: int | None, folder: Path) -> None:
    found = asdict(sensitivity) | {"relative_error": sensitivity.relative_error}
    (folder / "sensitivity.json").write_text(as_json(found))
    title = "Loss of one batch when one layer is perturbed"
    print_table(title, [asdict(layer) for layer in sensitivity.layers])
    print(
        "rms: root mean square of the projected gradients, which estimates the norm of the layer's gradient with a "
        f"standard error of {sensitivity.relative_error:.0%};\nmean_change: mean absolute change of the loss, which is "
        f"{sensitivity.loss:.4f} unperturbed, for eps {sensitivity.eps:g}"
    )
    if sensitivity.dtype in ("bfloat16", "float16"):
        print(
            f"The layers are in {sensitivity.dtype}, where rounding can move the loss more than the gradient does and "
            "all layers then look alike: repeat with --trainer.precision 32-true."
        )
    save_figure(sensitivity_figure(sensitivity, selected, title), folder, "sensitivity")


def _report_step_times(times: StepTimes, folder: Path) -> None:
    (folder / "step_time.json").write_text(as_json(asdict(times)))
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
        f"{times.model.per_parameter * 1e12:.3g} ps per parameter, R² {times.model.r_squared:.4f}"
    )
    save_figure(step_time_figure(times, title), folder, "step_time")


def _probed(inputs: Tensor, rows: Tensor) -> CrossValidation:
    """How well a probe of the head's inputs (N, H) tells its right rows (N,), penalised as LinearProbing chooses it."""
    classes, targets = rows.cpu().unique(return_inverse=True)
    return strongest_penalty(inputs.double().cpu(), targets, len(classes), CS, TOLERANCE)[1]


def _report_probes(probes: Mapping[int, CrossValidation], folder: Path) -> None:
    rows = [
        {"num_layers": count, "loss": probe.loss, "standard_error": probe.error, "accuracy": probe.accuracy}
        for count, probe in probes.items()
    ]
    (folder / "probes.json").write_text(as_json({"probes": rows}))
    title = "Linear probes after some of the layers, in five-fold cross-validation"
    print_table(title, rows)
    best = min(probes, key=lambda count: probes[count].loss)
    print(f"Lowest loss after {counted(best, 'layer')}: --model.num_layers {best} --linear_probing LinearProbing")
    save_figure(probe_figure(probes, title), folder, "probes")
