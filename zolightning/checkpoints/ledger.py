"""The ledger of a run: a file with the record of every step, from which its trained weights can be computed.

Layout of version 2, with all numbers little-endian:

1. ``zoledger`` (8 bytes), the version of the layout and the length n of what follows (both uint32); readers for a
   different version refuse the file;
2. the header, a JSON object of n bytes (:mod:`~zolightning.checkpoints.ledger_header`): package version, seed, method
   and settings, parameter groups, blocks and slices, names, dtypes and shapes of all tensors, SHA-256 of the base
   weights, the first numbers of a direction, ``fields``; then the CRC-32 of everything before (uint32);
3. the seal, 40 bytes: a number of steps (uint32), the digest of the weights after them (SHA-256), and the CRC-32 of
   both; zeros until a fit has ended;
4. one entry per step, all of the length that ``fields`` add up to.

The fields of an entry, in order: ``step`` and ``forward_passes`` (uint32); ``flags`` (uint8; bit 0: the step was not
skipped, bit 1: its loss wrote to the module or logged per epoch, bit 2: its bases were given); for methods with
subspaces ``refresh`` and ``folds`` (uint32); ``lr``, one per parameter group, ``projected_grads``, one per query, and
``losses``, one per evaluation (float64); with blocks ``blocks`` (uint8), one bit per block, set if it moved; and
``checksum`` (uint32), the CRC-32 of the entry's other bytes, continued from that of the entry before (the first: from
the header's). NumPy reads them as they are:
``np.fromfile(path, np.dtype([(name, kind, (count,)) for ...]), offset=60 + n)``.
"""

import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zolightning.checkpoints.checkpoint_io import is_written, lock, replacing
from zolightning.checkpoints.ledger_entry import EntryCodec
from zolightning.checkpoints.ledger_header import Header
from zolightning.messages import counted
from zolightning.optim.record import StepRecord

LEDGER = "ledger.bin"  # its name in the folder of a run
VERSION = 2
_START = struct.Struct("<8sII")
_SEAL = struct.Struct("<I32s")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"zoledger"
_UNSEALED = bytes(_SEAL.size + _CHECKSUM.size)


class DamagedLedgerError(RuntimeError):
    """A ledger was cut off or changed; the message names the file, the position and what is wrong with it."""


class Ledger:
    """The file of a ledger, for reading and, after :meth:`go_on`, for appending.

    An entry is written by a single system call, without buffering in the process. A process that is killed leaves the
    entries of all its complete steps, and at most a part of another one, which readers ignore. After :meth:`sync`
    entries survive a power cut as well.

    Args:
        path: path of the file.

    Attributes:
        header: what is in the file before its entries.
        checksum: that of the last entry which this object has written.

    Raises:
        FileNotFoundError: if there is none.
        DamagedLedgerError: if its header is cut off or changed.
        ValueError: if it is not a ledger, or has another version of the layout.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"The ledger {path} does not exist.")
        with path.open("rb") as file:
            start = file.read(_START.size)
            magic, version, length = _START.unpack(start) if len(start) == _START.size else (start, 0, 0)
            if magic != _MAGIC:
                raise ValueError(f"{path} is not the ledger of a run: it does not begin with `{_MAGIC.decode()}`.")
            if version != VERSION:
                raise ValueError(
                    f"The ledger {path} has version {version} of the layout, but this release reads version {VERSION}."
                )
            header, checksum = file.read(length), file.read(_CHECKSUM.size)
        self._header_checksum = zlib.crc32(start + header)
        if checksum != _CHECKSUM.pack(self._header_checksum):
            raise DamagedLedgerError(f"The ledger {path} is damaged: its header is truncated or corrupted.")
        self.header = Header(**json.loads(header))
        self._codec = EntryCodec(self.header.fields[:-1], self.header.seed)
        self._seal_at = _START.size + length + _CHECKSUM.size
        self._entries_at = self._seal_at + len(_UNSEALED)
        self._file: Any = None
        self.checksum = self._header_checksum
        self._length = 0

    @classmethod
    def create(cls, path: Path, header: Header) -> "Ledger":
        """Writes a ledger without entries, atomically.

        Raises:
            OSError: if it cannot be written, with the path and the reason.
        """
        text = json.dumps(asdict(header)).encode()
        start = _START.pack(_MAGIC, VERSION, len(text)) + text
        with replacing(path) as file:
            file.write(start + _CHECKSUM.pack(zlib.crc32(start)))
            file.write(_UNSEALED)
        return cls(path)

    @property
    def entry_size(self) -> int:
        """The number of bytes of an entry."""
        return self._codec.size + _CHECKSUM.size

    def __len__(self) -> int:
        """The number of complete entries."""
        return max(0, self.path.stat().st_size - self._entries_at) // self.entry_size

    def _place(self, steps: int) -> int:
        """The offset in the file after the first `steps` entries."""
        return self._entries_at + steps * self.entry_size

    # Reading

    def records(self, steps: int | None = None, start: int = 0) -> Iterator[StepRecord]:
        """The records of the steps from number `start` up to `steps`, counted from the beginning of the ledger.

        Args:
            steps: where to stop; None for all complete entries.
            start: how many to leave out at the beginning.

        Raises:
            ValueError: if there are fewer entries.
            DamagedLedgerError: at the first entry that was changed.
        """
        if steps is not None and steps > len(self):
            raise ValueError(f"The ledger {self.path} has {counted(len(self), 'step')}, but {steps:,} were asked for.")
        checksum = self.stored_checksum(start)
        with self.path.open("rb") as file:
            file.seek(self._place(start))
            for number in range(start, len(self) if steps is None else steps):
                entry = file.read(self.entry_size)
                body, stored = entry[: self._codec.size], entry[self._codec.size :]
                checksum = zlib.crc32(body, checksum)
                step = self.header.first_step + number
                record = self._codec.unpack(body) if stored == _CHECKSUM.pack(checksum) else None
                if record is None or record.step != step:
                    raise DamagedLedgerError(
                        f"The ledger {self.path} is damaged: the entry of step {step}, at byte {self._place(number)}, "
                        f"is corrupted. The {number} before it are intact."
                    )
                yield record

    def checksum_after(self, steps: int) -> int:
        """The checksum at the end of the first `steps` entries, all of which are verified.

        Raises:
            DamagedLedgerError: if one of them was changed.
        """
        for _ in self.records(steps):
            pass
        return self.stored_checksum(steps)

    def stored_checksum(self, steps: int) -> int:
        """The checksum at the end of the first `steps` entries, as stored in the file."""
        if not steps:
            return self._header_checksum
        with self.path.open("rb") as file:
            file.seek(self._place(steps) - _CHECKSUM.size)
            return int(_CHECKSUM.unpack(file.read(_CHECKSUM.size))[0])

    def seal(self) -> tuple[int, str] | None:
        """The number of steps and the digest of the weights that :meth:`close` wrote; None if it has not."""
        with self.path.open("rb") as file:
            file.seek(self._seal_at)
            body, checksum = file.read(_SEAL.size), file.read(_CHECKSUM.size)
        if checksum != _CHECKSUM.pack(zlib.crc32(body)):
            return None
        steps, digest = _SEAL.unpack(body)
        return (steps, digest.hex()) if steps else None

    def is_written(self) -> bool:
        """Whether another process has the file open for writing."""
        return is_written(self.path)

    def copy(self, path: Path, steps: int) -> "Ledger":
        """Copies the first `steps` steps to a ledger at `path`, and the files of given bases to its folder."""
        with self.path.open("rb") as file, replacing(path) as copy:
            copy.write(file.read(self._seal_at))
            copy.write(_UNSEALED)
            file.seek(self._entries_at)
            copy.write(file.read(steps * self.entry_size))
        for bases in self.path.parent.glob(f"{self.path.stem}-bases-*.pt"):
            shutil.copyfile(bases, path.parent / bases.name.replace(self.path.stem, path.stem, 1))
        return Ledger(path)

    # Writing

    def go_on(self, steps: int, keep: int = 0) -> None:
        """Opens the file for writing after the first `steps` steps.

        Args:
            steps: number of steps that have been taken.
            keep: number of further entries to keep until they are overwritten; those after them are cut off.

        Raises:
            DamagedLedgerError: if one of the first entries was changed.
            BlockingIOError: if another process writes the file.
            OSError: if the file cannot be written.
        """
        self.checksum, self._length, seal = self.checksum_after(steps), steps, self.seal()
        self._file = self.path.open("r+b", buffering=0)
        if not lock(self._file):
            self._file.close()
            raise BlockingIOError(f"The ledger {self.path} is being written by another process: its run has not ended.")
        if seal is not None and seal[0] > steps:
            self._write_at(self._seal_at, _UNSEALED)
        self._file.truncate(self._place(steps + keep))

    def append(self, record: StepRecord) -> None:
        """Writes the record of the next step.

        Raises:
            ValueError: if it is the record of another step, or does not have as many numbers as the header says.
            OSError: if it cannot be written; the file then ends with the previous step.
        """
        step = self.header.first_step + self._length
        if record.step != step:
            raise ValueError(f"The ledger {self.path} continues with step {step}, but step {record.step} was taken.")
        try:
            body = self._codec.pack(record)
        except ValueError as error:
            raise ValueError(f"{self.path} cannot take step {step}: {error}") from None
        checksum = zlib.crc32(body, self.checksum)
        entry = body + _CHECKSUM.pack(checksum)
        try:
            self._write_at(self._place(self._length), entry)
        except OSError as error:
            self._file.truncate(self._place(self._length))
            raise OSError(
                error.errno, f"The ledger {self.path} could not be written at step {step} ({error.strerror})"
            ) from error
        self.checksum, self._length = checksum, self._length + 1

    def sync(self) -> None:
        """Flushes all entries to the disk."""
        os.fsync(self._file.fileno())

    def close(self, digest: str | None = None) -> None:
        """Closes the file, and seals it first if the `digest` of the weights after the last step is given."""
        if digest is not None:
            body = _SEAL.pack(self._length, bytes.fromhex(digest))
            self._write_at(self._seal_at, body + _CHECKSUM.pack(zlib.crc32(body)))
            self._file.truncate(self._place(self._length))  # entries kept by `go_on` that this run did not reach
        self.sync()
        self._file.close()

    def _write_at(self, place: int, content: bytes) -> None:
        while content:  # a nearly full disk may accept only a part
            written = os.pwrite(self._file.fileno(), content, place)
            place, content = place + written, content[written:]
