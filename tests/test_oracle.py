"""torch as an oracle: recorded, given again where it is not, compared where it is; and skipping all is no pass."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import oracle_plugin
import oracle_record
import pytest
from oracle import HAS_TORCH, NEEDS_TORCH, torch
from oracle_record import Record, Session, State

of_torch = pytest.mark.skipif(not HAS_TORCH, reason=NEEDS_TORCH)


@pytest.fixture(autouse=True)
def own_session() -> Iterator[None]:
    before = State.session
    yield
    State.session = before


def work() -> list[Any]:
    """Something of each kind that tests do with torch."""
    layer = torch.nn.Linear(2, 3)
    layer.weight.data = torch.ones(3, 2)
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    out = (2 * layer(x) - 1).sum()
    out.backward()
    moved = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.ones(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.nn.functional.softmax(x)
    with torch.no_grad():
        moved.weight[0] = x[0] / 2
    rates: list[float] = []
    torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(layer.parameters(), lr=0.5), lambda step: 0.5**step)
    return [
        np.asarray(x.grad),
        np.asarray(moved.weight),
        tuple(layer.weight.shape),
        [name for name, _ in layer.named_parameters()],
        repr(layer),
        bool(out > 0),
        isinstance(x, torch.Tensor),
        x.dtype == torch.float32,
        [str(warning.message)[:20] for warning in caught],
        hasattr(torch.nn, "NoSuchLayer"),
        rates,
    ]


def begin(path: Path) -> Session:
    State.session = session = Session("work", Record(path), True)
    return session


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    session = begin(tmp_path / "a.npz")
    work()
    assert session.recordable
    oracle_record.write(tmp_path / "a.npz", {"work": session.done}, {"torch.nn.NoSuchLayer": oracle_record.ABSENT})
    return tmp_path / "a.npz"


@of_torch
def test_what_torch_gave_is_given_again_without_it(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin(recorded)
    expected = work()
    assert session.differs() is None
    monkeypatch.setattr(oracle, "HAS_TORCH", False)
    monkeypatch.setattr(oracle, "real_torch", None)
    monkeypatch.setattr(State, "names", Record(recorded).names)
    begin(recorded)
    for mine, other in zip(work(), expected, strict=True):
        np.testing.assert_array_equal(mine, other)


@of_torch
def test_a_record_that_is_not_current_is_found(recorded: Path) -> None:
    session = begin(recorded)
    work()
    torch.ones(2)
    assert "operations" in str(session.differs())
    session = begin(recorded)
    work()
    session.done[3] = ("other", *session.done[3][1:])
    assert "does other" in str(session.differs())
    session = begin(recorded)
    work()
    place = next(i for i, (op, _, value) in enumerate(session.done) if isinstance(value, np.ndarray))
    session.done[place] = (*session.done[place][:2], session.done[place][2] * 1.001)
    assert "not in the record" in str(session.differs())
    session.record.tests.clear()
    assert Session("work", session.record, True).differs() == "is not in the record"


@of_torch
def test_a_test_that_asks_something_else_fails_without_torch(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "HAS_TORCH", False)
    begin(recorded)
    with pytest.raises(pytest.fail.Exception, match="record of work is of another test.*--record-torch"):
        torch.zeros(2)


def test_without_record_or_torch_a_test_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "HAS_TORCH", False)
    for use in (lambda: torch.zeros(2), lambda: oracle.Absent().zeros, lambda: oracle.real(torch.zeros)):
        begin(tmp_path / "none.npz")
        with pytest.raises(pytest.skip.Exception, match=NEEDS_TORCH):
            use()

    class Net(torch.nn.Module):  # type: ignore[misc]
        pass

    begin(tmp_path / "none.npz")
    with pytest.raises(pytest.skip.Exception, match=NEEDS_TORCH):
        Net()


@of_torch
def test_what_torch_calls_cannot_be_recorded(tmp_path: Path) -> None:
    session = begin(tmp_path / "none.npz")
    layer = torch.nn.Linear(1, 1)
    layer.register_forward_hook(lambda module, args, out: None)
    layer(torch.ones(1, 1))
    assert not session.recordable


@pytest.mark.parametrize(
    ("ran", "args", "passes"), [(9, [], False), (10, [], True), (9, ["-k", "x"], True), (0, ["a.py"], True)]
)
def test_fewer_tests_than_were_promised_fail_the_run(
    ran: int, args: list[str], passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle_plugin, "HAS_TORCH", False)
    lines: list[str] = []
    skipped = [SimpleNamespace(longrepr=("file", 1, f"Skipped: {NEEDS_TORCH}"))] * 3
    stats = {"passed": [SimpleNamespace(longrepr=None)] * ran, "skipped": skipped}
    reporter = SimpleNamespace(stats=stats, write_line=lambda line, **_: lines.append(line))
    config: Any = SimpleNamespace(
        getoption=lambda name: False,
        pluginmanager=SimpleNamespace(get_plugin=lambda name: reporter),
        invocation_params=SimpleNamespace(args=args),
    )
    monkeypatch.setattr(oracle_plugin, "LEAST", 10)
    plugin, session = oracle_plugin.Plugin(config), SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    plugin.pytest_sessionfinish(session)
    plugin.pytest_terminal_summary(reporter)
    assert (session.exitstatus == pytest.ExitCode.OK) is passes
    assert (
        lines[0].startswith(f"{ran} tests ran without torch; 3 more, and ")
        and "pip install -e '.[oracles]'" in lines[0]
    )
    assert (len(lines) == 1) is passes
