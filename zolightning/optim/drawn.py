"""Noise as tensors, for methods that do more with it than add it to a weight."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zolightning.directions.dense import Direction, accumulate_each, coefficient_tensor, compute_dtype, directions
from zolightning.kernels.noise import NoiseKind, coefficient

Pair = tuple[str, int]  # the name of a parameter, and a query


def drawn(
    sizes: Mapping[Pair, int],
    what: str,
    parameters: Mapping[str, nn.Parameter],
    run: tuple[int, int],
    kind: NoiseKind,
    dtypes: Mapping[str, torch.dtype],
) -> dict[Pair, Tensor]:
    """Draws flat noise for pairs of a parameter's name and a query, on the parameter's device.

    It takes one launch on a GPU for each dtype. Noise has so few values that every dtype holds it exactly.

    Args:
        sizes: how many numbers each pair has.
        what: is appended to the name in the key of the noise, "left" for example.
        parameters: the parameters by name.
        run: seed and step.
        kind: distribution of the noise.
        dtypes: that of the numbers, by the parameter's name.
    """
    named = {f"{name}/{what}": parameters[name] for name, _ in sizes}
    places = {query: place for place, query in enumerate(dict.fromkeys(query for _, query in sizes))}
    found = directions(named, *run, dict.fromkeys(places, 1.0), kind) if sizes else {}
    alike: defaultdict[tuple[torch.dtype, torch.device], list[Pair]] = defaultdict(list)
    for pair in sizes:
        alike[dtypes[pair[0]], parameters[pair[0]].device].append(pair)
    noise: dict[Pair, Tensor] = {}
    for (dtype, device), pairs in alike.items():
        # One launch takes tensors of multiples of 16 elements, so the last ones may be unused.
        whole = [-(-sizes[pair] // 16) * 16 for pair in pairs]
        totals = torch.zeros(sum(whole), dtype=dtype, device=device).split(whole)
        one = coefficient_tensor((coefficient(1.0, kind),), compute_dtype(dtype), device)
        keys = [found[f"{name}/{what}"].keys[places[query]][None] for name, query in pairs]
        accumulate_each([Direction(key, one, kind) for key in keys], totals)
        noise |= {pair: total[: sizes[pair]] for pair, total in zip(pairs, totals, strict=True)}
    return noise
