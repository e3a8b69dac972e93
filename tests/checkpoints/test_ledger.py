"""The ledger's file: what is cut off, changed or of another run is told."""

import resource
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from optimizer_steps import MakeProblem, Method, assert_same, attached, weights
from zolightning.checkpoints.find_ledger import ledger_of
from zolightning.checkpoints.ledger import DamagedLedgerError, Ledger
from zolightning.checkpoints.ledger_header import describe_run
from zolightning.checkpoints.replay import replay
from zolightning.optim import MeZO, MeZOAdam, StepRecord
from zolightning.weights_digest import base_tensors, weights_digest

MEZO = partial(MeZO, lr=0.02, momentum=0.5)


@pytest.fixture
def ledger(tmp_path: Path, make_problem: MakeProblem) -> tuple[Ledger, list[StepRecord]]:
    """A closed one of eight steps of which the sixth is skipped, and its records."""
    problem = make_problem()
    optimizer, records = attached(MEZO, problem, seed=9), []
    ledger = Ledger.create(tmp_path / "ledger.bin", describe_run(optimizer, problem))
    ledger.go_on(0)
    for step in range(8):
        factor = float("nan") if step == 5 else 1.0
        records.append(optimizer.estimate(lambda factor=factor: problem() * factor, skip_nonfinite=True))
        optimizer.step()
        ledger.append(records[-1])
    ledger.close()
    return ledger, records


def same(one: list[StepRecord], other: list[StepRecord]) -> bool:
    return repr(one) == repr(other)  # nan is not nan


def test_a_torn_entry_is_no_step(ledger: tuple[Ledger, list[StepRecord]]) -> None:
    file, records = ledger
    whole = file.path.read_bytes()
    for length in range(1, file.entry_size + 1):
        file.path.write_bytes(whole[:-length])
        assert len(file) == 7 and same(list(Ledger(file.path).records()), records[:7])
    again = Ledger(file.path)
    again.go_on(7)
    again.append(records[7])
    again.close()
    assert file.path.read_bytes() == whole


def test_a_changed_bit_is_found_and_named(ledger: tuple[Ledger, list[StepRecord]]) -> None:
    file, _ = ledger
    whole = file.path.read_bytes()
    entries, size = len(whole) - 8 * file.entry_size, file.entry_size
    for place in [
        *range(16),
        *range(16, entries - 44, 20),
        *range(entries - 44, entries),
        *range(entries, len(whole), 7),
    ]:
        file.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        if place >= entries:
            step = (place - entries) // size
            with pytest.raises(
                DamagedLedgerError, match=rf"the entry of step {step}, at byte {entries + step * size},"
            ):
                list(Ledger(file.path).records())
        elif place >= entries - 40:  # the seal, of which there is none
            assert Ledger(file.path).seal() is None
        else:
            with pytest.raises((DamagedLedgerError, ValueError), match=r"not the ledger|version|header") as error:
                Ledger(file.path)
            assert str(file.path) in str(error.value) and "\n" not in str(error.value)


def test_going_on_cuts_off_the_steps_after(ledger: tuple[Ledger, list[StepRecord]]) -> None:
    file, records = ledger
    whole = file.path.read_bytes()
    file.go_on(8)
    file.close("ab" * 32)
    assert Ledger(file.path).seal() == (8, "ab" * 32)
    file.go_on(3)
    with pytest.raises(ValueError, match="continues with step 3, but step 7 was taken"):
        file.append(records[7])
    for record in records[3:]:
        file.append(record)
    file.close()
    assert file.path.read_bytes() == whole  # no seal either: it was of steps that are gone


def test_a_record_of_other_numbers_is_refused(ledger: tuple[Ledger, list[StepRecord]]) -> None:
    file, records = ledger
    file.go_on(7)
    with pytest.raises(ValueError, match=r"cannot take step 7: it has 2 of `projected_grads`, .* have room for 1"):
        file.append(replace(records[7], projected_grads=(1.0, 2.0)))
    file.append(records[7])
    file.close()


def test_entries_say_which_of_many_blocks_moved(tmp_path: Path) -> None:
    module = nn.ParameterList(torch.ones(2) for _ in range(18))
    optimizer = attached(MEZO, module)
    optimizer.set_blocks([[parameter] for parameter in module])
    ledger, records = Ledger.create(tmp_path / "ledger.bin", describe_run(optimizer, module)), []
    ledger.go_on(0)
    for blocks in ([0], [7, 8], [3, 16, 17], range(18)):
        optimizer.activate(blocks)
        records.append(optimizer.estimate(lambda: sum(parameter.square().sum() for parameter in module)))
        optimizer.step()
        ledger.append(records[-1])
    ledger.close()
    assert [record.blocks for record in records] == [(0,), (7, 8), (3, 16, 17), tuple(range(18))]
    assert list(ledger.records()) == records


def test_a_digest_is_of_dtypes_shapes_and_bits() -> None:
    zeros = torch.zeros(4)
    others = [zeros.view(2, 2), zeros.int(), torch.tensor([0.0, 0.0, 0.0, -0.0])]
    assert len({weights_digest({"w": tensor}) for tensor in (zeros, *others)}) == 4
    assert weights_digest({"w": torch.zeros(8)[::2]}) == weights_digest({"w": zeros}) != weights_digest({"v": zeros})
    assert weights_digest({"w": torch.zeros(4)[::2][:1]}) == weights_digest({"w": torch.zeros(1)})
    pairs = [TwoTensor(zeros, torch.full((4,), float(value))) for value in (1, 1, 2)]  # as quantised weights of torchao
    first, same, other = (weights_digest({"w": pair}) for pair in pairs)
    assert first == same != other
    module = nn.BatchNorm1d(2)
    module.register_buffer("made_anew", zeros, persistent=False)
    assert base_tensors(module).keys() == module.state_dict().keys()


def test_anybody_can_read_it(ledger: tuple[Ledger, list[StepRecord]]) -> None:
    """With NumPy, as the module's docstring says."""
    file, records = ledger
    fields = np.dtype([(name, kind, () if count == 1 else (count,)) for name, kind, count in file.header.fields])
    data = file.path.read_bytes()
    found = np.frombuffer(data, fields, offset=60 + int.from_bytes(data[12:16], "little"))
    assert found["step"].tolist() == list(range(8)) and found["lr"].tolist() == [record.lr[0] for record in records]
    assert np.array_equal(found["losses"], [record.losses for record in records], equal_nan=True)


def test_a_full_disk_leaves_whole_entries(ledger: tuple[Ledger, list[StepRecord]]) -> None:
    file, records = ledger
    whole = file.path.read_bytes()
    file.go_on(7)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - file.entry_size + 10, hard))
    try:
        with pytest.raises(OSError, match=r"ledger.bin could not be written at step 7 \(File too large\)"):
            file.append(records[7])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.path.read_bytes() == whole[: -file.entry_size]
    file.append(records[7])  # there is room again
    file.close()
    assert file.path.read_bytes() == whole


class TestRefused:
    """In one line, and the weights are what they were."""

    @pytest.mark.parametrize(
        ("method", "words"),
        [
            (partial(MEZO, momentum=0.9), "belongs to a run with different settings: `momentum` 0.5, not 0.9."),
            (partial(MEZO, num_queries=2), ": `num_queries` 1, not 2."),
            (partial(MeZOAdam), ": .*`class` 'MeZO', not 'MeZOAdam'"),
        ],
        ids=str,
    )
    def test_another_method(
        self, ledger: tuple[Ledger, list[StepRecord]], make_problem: MakeProblem, method: Method, words: str
    ) -> None:
        self.refused(ledger, make_problem(), words, method)

    def test_another_model(self, ledger: tuple[Ledger, list[StepRecord]], make_problem: MakeProblem) -> None:
        changed, larger = make_problem(), make_problem()
        with torch.no_grad():
            changed.vector[3] = torch.nextafter(changed.vector[3], torch.tensor(9.0))
        self.refused(ledger, changed, "begins with different weights")
        larger.extra = nn.Parameter(torch.ones(1))
        self.refused(ledger, larger, r"belongs to a different model: 1 weights have other names or shapes.* \(extra\)")

    @pytest.mark.parametrize("step", [-1, 9])
    def test_another_step(self, ledger: tuple[Ledger, list[StepRecord]], make_problem: MakeProblem, step: int) -> None:
        self.refused(ledger, make_problem(), "`step` must be at least 0 and at most 8", step=step)

    def test_another_noise(
        self,
        ledger: tuple[Ledger, list[StepRecord]],
        make_problem: MakeProblem,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("zolightning.checkpoints.ledger_header.codes", lambda index, *_: ~index)
        self.refused(ledger, make_problem(), "whose directions are not those of")

    def refused(
        self, ledger: tuple[Ledger, list[StepRecord]], module: nn.Module, words: str, method: Method = MEZO, **step: int
    ) -> None:
        before = weights(module)
        with pytest.raises(ValueError, match=words) as error:
            replay(ledger[0].path, module, method, **step)
        assert "\n" not in str(error.value)
        assert_same(weights(module), before)


def test_a_run_knows_its_own_ledger(tmp_path: Path, make_problem: MakeProblem, method: Method) -> None:
    """With every method: settings that are tuples, schedules by step among them, are lists in the file."""
    problem = make_problem()
    Ledger.create(tmp_path / "ledger.bin", describe_run(attached(method, problem), problem))
    again = make_problem()
    assert len(ledger_of(tmp_path / "ledger.bin", describe_run(attached(method, again), again))) == 0
    other = attached(method, again, seed=17)
    with pytest.raises(MisconfigurationException, match="belongs to a run with different `seed`"):
        ledger_of(tmp_path / "ledger.bin", describe_run(other, again))
