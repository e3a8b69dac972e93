"""Encodes a step's record as an entry of a ledger."""

import struct
from collections.abc import Sequence
from typing import Any

from zolightning.optim.record import StepRecord

_CODES = {"u1": "B", "u4": "I", "f8": "d"}  # from NumPy's names of types to those of `struct`
_ESTIMATED, _TRACES, _GIVEN = 1, 2, 4  # bits of `flags`


class EntryCodec:
    """Converts records to bytes and back, without an entry's checksum, using the header's `fields` and `seed`."""

    def __init__(self, fields: Sequence[Sequence[Any]], seed: int) -> None:
        self._counts = {str(name): int(count) for name, _, count in fields}
        self._struct = struct.Struct("<" + "".join(f"{count}{_CODES[kind[1:]]}" for _, kind, count in fields))
        self._seed = seed

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self._struct.size

    def pack(self, record: StepRecord) -> bytes:
        """The bytes of a record. Raises a ValueError if it does not have the number of values that entries have."""
        skipped = [0.0] * (0 if record.projected_grads else self._counts["projected_grads"])
        bits = bytearray(self._counts.get("blocks", 0))
        for block in record.blocks:
            bits[block // 8] |= 1 << block % 8
        flags = _ESTIMATED * bool(record.projected_grads) | _TRACES * record.leaves_traces | _GIVEN * record.given
        found: dict[str, tuple[Any, ...]] = {
            **{name: (getattr(record, name),) for name in ("step", "refresh", "folds", "forward_passes")},
            "flags": (flags,),
            "lr": record.lr,
            "projected_grads": (*record.projected_grads, *skipped),
            "losses": record.losses,
            "blocks": tuple(bits),
        }
        numbers: list[float] = []
        for name, count in self._counts.items():
            if len(found[name]) != count:
                raise ValueError(f"it has {len(found[name])} of `{name}`, but entries have room for {count}")
            numbers += found[name]
        return self._struct.pack(*numbers)

    def unpack(self, entry: bytes) -> StepRecord:
        """The record of :attr:`size` bytes."""
        numbers = iter(self._struct.unpack(entry))
        values = {name: tuple(next(numbers) for _ in range(count)) for name, count in self._counts.items()}
        bits, (flags,) = values.get("blocks", ()), values["flags"]
        return StepRecord(
            step=values["step"][0],
            seed=self._seed,
            lr=values["lr"],
            projected_grads=values["projected_grads"] if flags & _ESTIMATED else (),
            losses=values["losses"],
            forward_passes=values["forward_passes"][0],
            refresh=values.get("refresh", (0,))[0],
            folds=values.get("folds", (0,))[0],
            given=bool(flags & _GIVEN),
            leaves_traces=bool(flags & _TRACES),
            blocks=tuple(block for block in range(8 * len(bits)) if bits[block // 8] >> block % 8 & 1),
        )
