"""Statistics of the outputs of each layer on a few prompts, by which a dominant layer is found."""

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zolightning.layers import LayerStack
from zolightning.scopes.calibration import calibration_forward
from zolightning.scopes.token_mask import TokenMask

_KEPT = 4  # channels and token positions worth reporting: outliers sit in very few


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the architecture that a profile was measured on."""

    layer_class: str  # of the layers
    num_layers: int
    shapes: str  # hash of the names and shapes of their parameters

    @classmethod
    def of(cls, stack: LayerStack) -> "Fingerprint":
        shapes = [
            f"{index}.{name}{tuple(parameter.shape)}"
            for index, layer in enumerate(stack.layers)
            for name, parameter in layer.named_parameters()
        ]
        digest = hashlib.blake2b("\n".join(shapes).encode(), digest_size=8).hexdigest()
        return cls(type(stack.layers[0]).__name__, len(stack), digest)

    def __str__(self) -> str:
        return f"{self.num_layers} layers of class {self.layer_class}, parameter shapes {self.shapes}"


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a layer's output (the residual stream after it), without padding, in float32."""

    max: float  # largest absolute value, median over the sequences
    mean: float  # mean absolute value, mean over the sequences
    median: float  # median absolute value, median over the sequences
    peak: float  # largest absolute value of all sequences
    channels: tuple[int, ...]  # those with the largest values, largest first
    tokens: tuple[int, ...]  # positions of the sequences' maxima, from the first token on, most frequent first


@dataclass(frozen=True)
class ActivationProfile:
    """Statistics of all layers of one model."""

    fingerprint: Fingerprint  # of the model
    num_prompts: int  # sequences that were run; a prompt with several long candidates counts once for each
    layers: tuple[LayerStatistics, ...]  # in order

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "ActivationProfile":
        """Reads what :meth:`save` wrote. Raises a ValueError if the file is not a profile."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = [
                LayerStatistics(**layer | {name: tuple(layer[name]) for name in ("channels", "tokens")})
                for layer in content["layers"]
            ]
            return cls(Fingerprint(**content["fingerprint"]), content["num_prompts"], tuple(layers))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"not an activation profile ({type(error).__name__}: {error})") from None

    def table(self) -> str:
        """One line a layer; `jump` is its maximum over that of the layer before."""
        lines = ["layer         max       mean     median  max/median      jump  channels, tokens"]
        before: float | None = None
        for index, layer in enumerate(self.layers):
            jump = "" if not before else f"{layer.max / before:.2f}"
            ratio = f"{layer.max / layer.median:.0f}" if layer.median else "inf"
            channels, tokens = (" ".join(map(str, values)) for values in (layer.channels, layer.tokens))
            lines.append(
                f"{index:5} {layer.max:11.2f} {layer.mean:10.3f} {layer.median:10.3f} {ratio:>11} {jump:>9}  "
                f"{channels}, {tokens}"
            )
            before = layer.max
        return "\n".join(lines)


def profile_activations(module: L.LightningModule, batches: Iterable[Any], stack: LayerStack) -> ActivationProfile:
    """Measures the outputs of all layers in one pass over `batches`, keeping no activation.

    Run it in float32 or bfloat16: the values it looks for exceed what float16 can hold. The module's ``training_step``
    runs the network, on batches on its device.

    Raises:
        ValueError: if a layer does not run, or an output is not finite.
    """
    recorders = [_Recorder(index) for index in range(len(stack))]
    with TokenMask(module, stack) as mask, ExitStack() as hooks:
        for layer, recorder in zip(stack.layers, recorders, strict=True):

            def record(_: Any, __: Any, output: Any, recorder: _Recorder = recorder) -> None:
                hidden = output if isinstance(output, Tensor) else output[0]
                recorder.add(hidden.detach(), mask.of(hidden))

            hooks.enter_context(layer.register_forward_hook(record))
        for batch in batches:
            calibration_forward(module, batch)
    for index, recorder in enumerate(recorders):
        if not recorder.maxima:
            raise ValueError(
                f"Layer {index} of `{stack.name}` did not run on any token. Where the network is compiled, measure it "
                "before; where these are not its layers, set `layers_name`."
            )
    layers = tuple(recorder.statistics() for recorder in recorders)
    return ActivationProfile(Fingerprint.of(stack), len(recorders[0].maxima), layers)


class _Recorder:
    """What is kept of one layer's outputs: a few numbers a sequence, one a channel."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.maxima: list[float] = []
        self.means: list[float] = []
        self.medians: list[float] = []
        self.channel_maxima = torch.zeros(())  # (channels,) from the first sequence on
        self.positions: Counter[int] = Counter()

    def add(self, hidden: Tensor, tokens: Tensor) -> None:
        if hidden.ndim not in (2, 3):
            raise ValueError(
                f"Layer {self.index} returns a tensor of shape {tuple(hidden.shape)}; (sequences, tokens, channels) "
                "or (sequences, channels) can be measured."
            )
        if hidden.ndim == 2:
            hidden, tokens = hidden[:, None], tokens[:, None]
        for sequence, is_token in zip(hidden, tokens, strict=True):
            values = sequence[is_token].abs().float()  # (tokens, channels)
            if not len(values):
                continue
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"The output of layer {self.index} is not finite in {hidden.dtype}: profile the model in bfloat16 "
                    "or float32 (`model.dtype`)."
                )
            per_channel, per_token = values.amax(dim=0), values.amax(dim=1)
            self.maxima.append(per_token.max().item())
            self.means.append(values.mean().item())
            self.medians.append(values.median().item())
            self.positions[int(per_token.argmax())] += 1
            self.channel_maxima = torch.maximum(self.channel_maxima.to(per_channel.device), per_channel)

    def statistics(self) -> LayerStatistics:
        channels = self.channel_maxima.sort(descending=True, stable=True).indices[:_KEPT]
        by_frequency = sorted(self.positions, key=lambda position: (-self.positions[position], position))
        return LayerStatistics(
            max=statistics.median(self.maxima),
            mean=statistics.fmean(self.means),
            median=statistics.median(self.medians),
            peak=max(self.maxima),
            channels=tuple(channels.tolist()),
            tokens=tuple(by_frequency[:_KEPT]),
        )
