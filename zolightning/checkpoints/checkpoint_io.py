"""Writes checkpoint files atomically, and verifies them before they are loaded."""

import errno
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType
from typing import IO, Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

LAST = "last.ckpt"  # the name of a run's last checkpoint
LOCK = ".lock"  # the name of a file that is locked by the process whose checkpoints are in the same folder
_UNFINISHED = ".unfinished"


class DamagedCheckpointError(RuntimeError):
    """A checkpoint file differs from what was written; the message names the file and what is wrong with it."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes checkpoints with ``torch.save`` and ``torch.load``, safely and in little memory.

    A file is written next to its target, directly from the tensors (Lightning's own plugin copies it to memory twice),
    and replaces the target once it is completely on disk, so that a kill or a full disk leaves the previous file
    intact. It is read by memory mapping, after its checksums (CRC32 of the zip format) have been verified.

    Paths that are not local files, such as ``s3://...``, are left to Lightning.

    Raises:
        OSError: if a checkpoint cannot be written, with the path and the reason.
        DamagedCheckpointError: if a checkpoint to be loaded is empty, cut off or changed.

    Example::

        trainer = L.Trainer(plugins=[AtomicCheckpointIO()], callbacks=[ZerothOrder(...), SaveLast()])
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        if not _is_local(path) or Path(path).is_dir():
            return super().load_checkpoint(path, map_location, weights_only)
        require_whole(Path(path))
        if not zipfile.is_zipfile(path):
            return super().load_checkpoint(path, map_location, weights_only)
        try:
            return torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)
        except RuntimeError as error:
            if "PytorchStreamReader" not in str(error):
                raise
            raise DamagedCheckpointError(_damaged(Path(path), str(error).partition("\n")[0])) from error


def require_whole(path: Path) -> None:
    """Verifies the checksums of a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedCheckpointError: if the file is empty, cut off or changed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint {path} does not exist.")
    if not path.stat().st_size:
        raise DamagedCheckpointError(_damaged(path, "it is empty"))
    if is_pickle(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # any error that changed lengths and offsets may cause
        raise DamagedCheckpointError(_damaged(path, f"it is truncated or corrupted ({error})")) from error
    if broken is not None:
        raise DamagedCheckpointError(_damaged(path, f"the checksum of its entry `{broken}` is wrong"))


def is_pickle(path: Path) -> bool:
    """Whether a checkpoint is a bare pickle, torch's format before 1.6, which has no checksums."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A context with a file to write, which replaces `path` once it is completely on disk, and is removed on an error.

    The file is next to `path` and locked while it is written, so that :func:`remove_unfinished` can tell what a killed
    process left from what another process is writing.

    Raises:
        OSError: if it cannot be written, with `path` and the reason; `path` is unchanged.
    """
    fcntl = _file_locks()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            with suppress(OSError):  # on a disk without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, path)
        _sync_folder(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        # torch.save hides the reason behind an error of its zip writer.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, Exception) and isinstance(reason, OSError):
            raise OSError(
                reason.errno,
                f"{path} could not be written ({reason.strerror}); what was there is unchanged",
            ) from error
        raise


def replace_text(path: Path, text: str) -> None:
    """Writes a text file by :func:`replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def require_writable(name: str, folder: Path) -> None:
    """Raises a ValueError that names a setting if its folder cannot be made, or no file can be written to it."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    nearest = folder if not missing else missing[-1].parent
    try:
        with TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"`{name}` is {folder}, where no file can be written: {error.strerror}.") from None


def remove_unfinished(folder: Path) -> None:
    """Deletes the unfinished files of killed processes in `folder`, but not those that are being written."""
    fcntl = _file_locks()
    for path in folder.glob(f".*{_UNFINISHED}"):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # it is being written, or the disk has no locks
                continue
            path.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """A context that only one process at a time can be in for a folder.

    Raises:
        BlockingIOError: if another process is in it.
        OSError: if no file can be written to the folder.
    """
    path = folder / LOCK
    with without_new_folders(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if not lock(file) or not os.fstat(file.fileno()).st_nlink:  # the other process has just removed it
                raise BlockingIOError(
                    f"Another process is training and saves its steps in {folder}: wait for it, or stop it."
                )
            yield
            path.unlink(missing_ok=True)


@contextmanager
def without_new_folders(folder: Path) -> Iterator[None]:
    """A context at whose end `folder` and those above it are removed, if they were made within it and are empty."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        with suppress(OSError):  # it is not empty, or was never made
            for each in new:
                each.rmdir()


def lock(file: IO[bytes], shared: bool = False) -> bool:
    """Locks a file for as long as it is open; returns False if another process has locked it.

    Returns True on a disk without locks, as clusters may have, where this cannot be known. A lock ends with the process
    and is not inherited, but is lost if the process closes another handle of the file. Several processes may have a
    `shared` lock.
    """
    fcntl = _file_locks()
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def is_written(path: Path) -> bool:
    """Whether another process has a file open for writing, and locked."""
    with path.open("rb") as file:
        return not lock(file, shared=True)


def _file_locks() -> ModuleType:
    """Python's module for file locks.

    Raises:
        OSError: on Windows, which does not have it, nor lets go of the name of a file that is open.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError("Steps can be saved on Linux and macOS only, not on Windows (its WSL is Linux).") from None
    return fcntl


def _sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, without which a power cut could restore the previous file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # of disks that can flush files only
            raise
    finally:
        os.close(descriptor)


def _is_local(path: str | Path) -> bool:
    return isinstance(get_filesystem(path), LocalFileSystem)


def _damaged(path: Path, what: str) -> str:
    return (
        f"The checkpoint {path} is damaged: {what}. Use another file of the run: best-*.ckpt, last.ckpt or ledger.bin."
    )
