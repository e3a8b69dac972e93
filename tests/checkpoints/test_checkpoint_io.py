"""Checkpoints are whole or not there, stream to the disk, and are refused when they are not what was written."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from torch import Tensor

from zolightning.bench.measure import reset_peak
from zolightning.checkpoints.checkpoint_io import (
    AtomicCheckpointIO,
    DamagedCheckpointError,
    remove_unfinished,
    replacing,
)

CHECKPOINT = {"state_dict": {"weight": torch.arange(300.0), "twin": torch.ones(7)}, "global_step": 3}


def saved(folder: Path) -> Path:
    path = folder / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    return path


def assert_is_checkpoint(found: dict[str, Any]) -> None:
    torch.testing.assert_close(found, CHECKPOINT, rtol=0, atol=0)


# One process for three tests, as most of its time goes into imports: 100 MiB of weights are written, a disk is full in
# the middle of a tensor (where torch reports an error of its zip writer), and the process is killed while it writes.
SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
import torch
from zolightning.bench.measure import peak_bytes, reset_peak
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO, replacing

path = Path(sys.argv[1])
weights = {str(i): torch.ones(2**20) for i in range(25)}
reset_peak()
before = peak_bytes()
AtomicCheckpointIO().save_checkpoint({"state_dict": weights}, path.with_name("large.ckpt"))
print((peak_bytes() - before) / 2**20)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    AtomicCheckpointIO().save_checkpoint(weights, path)
except OSError as error:
    print(error, flush=True)

with replacing(path) as file:
    file.write(b"PK half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The checkpoint that a killed process found and was about to replace, and the two lines that it printed."""
    path = saved(tmp_path_factory.mktemp("killed"))
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    peak, message = result.stdout.splitlines()
    return path, peak, message


def test_peak_memory_of_writing(killed: tuple[Path, str, str]) -> None:
    """Lightning's own writer would hold the 100 MiB twice more."""
    if not reset_peak():
        pytest.skip("this system cannot reset a process's peak memory")
    assert float(killed[1]) < 15


def test_a_full_disk_is_named(killed: tuple[Path, str, str]) -> None:
    path, _, message = killed
    assert str(path) in message and "File too large" in message


def test_a_kill_leaves_the_previous_file_and_its_traces_are_removed(killed: tuple[Path, str, str]) -> None:
    path, _, _ = killed
    assert_is_checkpoint(torch.load(path, weights_only=True))
    (path.parent / "large.ckpt").unlink()
    assert len(list(path.parent.iterdir())) == 2
    remove_unfinished(path.parent)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


class Fails:
    """Pickles as an error: of a disk that is full, or of a process that is told to end."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def test_what_is_saved_is_loaded_also_by_torch(tmp_path: Path) -> None:
    path = saved(tmp_path / "made" / "é")
    found = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert_is_checkpoint(found)
    assert_is_checkpoint(torch.load(path, weights_only=True))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_previous_file(tmp_path: Path, error: BaseException) -> None:
    path = saved(tmp_path)
    with pytest.raises(type(error)) as raised:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "bad": Fails(error)}, path)
    if isinstance(error, OSError):
        assert str(path) in str(raised.value) and "No space left on device" in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert_is_checkpoint(torch.load(path, weights_only=True))


def test_a_file_is_on_the_disk_before_it_replaces_another_and_so_is_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may come in between."""
    done: list[Any] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        found = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(found.st_mode) else found.st_size)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", lambda *paths: (done.append("replaced"), replace(*paths)))
    with replacing(tmp_path / "last.ckpt") as file:
        file.write(b"all of it")
    assert done == [9, "replaced", "folder"]


def test_on_a_disk_that_cannot_flush_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of other systems, which network and containers bring."""
    fsync = os.fsync

    def of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", of_files)
    assert_is_checkpoint(torch.load(saved(tmp_path), weights_only=True))


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    with replacing(tmp_path / "last.ckpt") as file:
        remove_unfinished(tmp_path)
        file.write(b"all of it")
    assert (tmp_path / "last.ckpt").read_bytes() == b"all of it"


def test_the_temporary_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))  # TMPDIR would fall back to /tmp
    saved(tmp_path)


def test_every_changed_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    path, damaged = saved(tmp_path), tmp_path / "damaged.ckpt"
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 17):
        damaged.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            found = AtomicCheckpointIO().load_checkpoint(damaged, weights_only=True)
        except DamagedCheckpointError as error:
            assert str(damaged) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert_is_checkpoint(found)  # the byte was padding
    assert refused > 0.5 * len(content) / 17


@pytest.mark.parametrize("length", [0, 1, 100, 1500, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedCheckpointError) as raised:
        AtomicCheckpointIO().load_checkpoint(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


class Executes:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "pickle"])
@pytest.mark.parametrize("weights_only", [None, True])
def test_loading_executes_nothing(tmp_path: Path, weights_only: bool | None, is_zip: bool) -> None:
    """As Lightning loads, where nobody says otherwise."""
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": Executes(tmp_path / "executed")}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert not (tmp_path / "executed").exists()


def test_an_error_that_is_not_of_the_file(tmp_path: Path) -> None:
    def no_device(storage: Any, location: str) -> Any:
        raise RuntimeError("there is no such device")

    with pytest.raises(RuntimeError, match=r"^there is no such device$"):
        AtomicCheckpointIO().load_checkpoint(saved(tmp_path), no_device)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt does not exist"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def test_lightning_takes_it_for_its_own(tmp_path: Path, make_trainer: Any, make_regression: Any) -> None:
    trainer = make_trainer(plugins=[AtomicCheckpointIO()])
    module = make_regression()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    weights: dict[str, Tensor] = trainer.strategy.load_checkpoint(tmp_path / "saved.ckpt")["state_dict"]
    torch.testing.assert_close(weights, dict(module.state_dict()), rtol=0, atol=0)
