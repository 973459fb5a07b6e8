"""Threads that read, copy and save what another one trains: arrays stay alive, and states are of one moment."""

from __future__ import annotations

import copy
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from training import within

import minitorch_jax as mt
from minitorch_jax import optim
from minitorch_jax.state import concurrent_reads
from minitorch_jax.state.concurrent_reads import flights, private

SIZE = 4000


class Net(mt.Module):
    """All its numbers follow from the number of steps: the loss's gradient is 1 everywhere."""

    def __init__(self) -> None:
        self.small = mt.Parameter(jnp.zeros(3))
        self.large = mt.Parameter(jnp.zeros(SIZE))

    def forward(self) -> Any:
        return self.small.sum() + self.large.sum()


def make() -> tuple[Net, optim.SGD]:
    net = Net()
    return net, optim.SGD([net], lr=1.0, momentum=1.0)  # after n steps: momentum n, parameters -n (n + 1) / 2


def eagerly(net: Net, opt: Any) -> Callable[[], Any]:
    def train() -> None:
        opt.zero_grad()
        mt.backward(net)
        opt.step()

    return train


def only_steps(net: Net, opt: Any) -> Callable[[], Any]:
    mt.backward(net)
    return opt.step  # type: ignore[no-any-return]


def scanned(net: Net, opt: Any) -> Callable[[], Any]:
    train = eagerly(net, opt)
    return lambda: mt.scan(train, length=2)


def calling_back(net: Net, opt: Any) -> Callable[[], Any]:
    train = eagerly(net, opt)

    @mt.jit
    def both() -> None:
        train()
        jax.debug.callback(lambda: None)

    return both


FORMS: dict[str, Callable[[Net, Any], Callable[[], Any]]] = {
    "loop": eagerly,
    "step": only_steps,
    "jit": lambda net, opt: mt.jit(eagerly(net, opt)),
    "scan": scanned,
    "packed": lambda net, opt: (mt.pack(net, max_size=10_000), eagerly(net, opt))[1],
    "callback": calling_back,
}


@contextmanager
def training(train: Callable[[], Any]) -> Iterator[threading.Thread]:
    """`train()` again and again in another thread, with many switches between the two."""
    for _ in range(3):
        train()
    stop, errors = threading.Event(), []

    def run() -> None:
        try:
            for _ in range(2500):  # float32 is exact for as many steps
                if not stop.is_set():
                    train()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread, interval = threading.Thread(target=run), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        with within(60):
            yield thread
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors, errors


def is_of_one_moment(small: Any, large: Any, momentum: Any = None, steps: Any = None) -> None:
    assert set(np.unique(small)) == set(np.unique(large))
    if momentum is not None:
        assert set(np.unique(momentum)) == {steps}
        assert set(np.unique(small)) == {-steps * (steps + 1) / 2}


def of_copy(opt: Any) -> tuple[Any, ...]:
    state = opt.state_dict()
    net = opt.modules[0]
    return net.small, net.large, state["state"]["0.large"]["momentum_buffer"], state["num_steps"]


READERS: dict[str, Callable[[Net, Any, Path], Any]] = {
    "state_dict": lambda net, opt, path: net.state_dict().values(),
    "leaves": lambda net, opt, path: jax.tree.leaves(net),
    "deepcopy": lambda net, opt, path: of_copy(copy.deepcopy(opt)),
    "pytree copy": lambda net, opt, path: of_copy(jax.tree.map(lambda a: a, opt)),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_beside_training_stays_and_is_of_one_moment(form: str, tmp_path: Path) -> None:
    net, opt = make()
    kept: list[tuple[Any, Any]] = []
    with training(FORMS[form](net, opt)):
        end = time.monotonic() + 0.7
        while time.monotonic() < end and opt.num_steps < 5000:
            for _ in range(20):
                array = net.large if len(kept) % 2 else net.parameters()[0]
                kept.append((array, np.array(array)))
            assert opt.num_steps >= 3
            assert pickle.loads(pickle.dumps(net)).large.shape == (SIZE,)
            for read in READERS.values():
                is_of_one_moment(*read(net, opt, tmp_path))
        path = tmp_path / "run.npz"
        mt.save(path, net=net, opt=opt)
    for array, value in kept:
        assert_array_equal(array, value)
    net, opt = make()
    mt.load(path, net=net, opt=opt)
    is_of_one_moment(*of_copy(opt))
    assert not flights


def test_the_same_arrays_as_without_threads() -> None:
    """Where nothing is in flight, what is read is the array itself, and what was copied once is not copied again."""
    net, opt = make()
    train = eagerly(net, opt)
    train()
    assert net.large is net.large
    state = net.state_dict()
    assert state["large"] is net.large
    train()
    held = [cell.stored for cell in net._cells.values()]
    train()
    assert all(array.is_deleted() for array in held)


def test_a_signal_handler_reads_what_it_interrupts() -> None:
    """It may come between the look at what is lent and the call, in the same thread: it waits for nothing."""
    net, opt = make()
    train = mt.jit(eagerly(net, opt))
    for _ in range(3):
        train()
    read: list[tuple[Any, Any]] = []
    rng = random.Random(0)

    def handler(*_: Any) -> None:
        for array in (net.small, net.large):
            read.append((array, np.array(array)))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for step in (train, eagerly(net, opt)):
            end = time.monotonic() + 0.4
            while time.monotonic() < end:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 5e-4))
                for _ in range(10):
                    step()
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(read) > 20
    for array, value in read:
        assert_array_equal(array, value)


def test_a_reader_waits_for_no_callback() -> None:
    """A callback in a program reads in one thread, and has another thread read, what the program will change."""
    net, opt = make()
    eager, values = eagerly(net, opt), []

    def look() -> None:
        values.append(np.array(net.large)[0])
        other = threading.Thread(target=lambda: values.append(np.array(net.state_dict()["large"])[0]))
        other.start()
        other.join()

    @mt.jit
    def train() -> None:
        eager()
        jax.debug.callback(look)

    with within(60):
        for _ in range(3):
            train()
    assert values == [0.0, 0.0, -1.0, -1.0, -3.0, -3.0]


def pipeline_of(opt: Any) -> Any:
    """What the last step ran."""
    (binding,) = opt._plan.outside(opt)._walk.bindings.values()
    return binding.pipeline


def test_a_reader_waits_for_a_dispatch_alone() -> None:
    """An array that is gone, whose successor is about to be stored."""
    net, opt = make()
    only_steps(net, opt)()
    cell = net._cells["large"]
    flights[-1] = pipeline_of(opt)  # as if another thread were in the call
    try:
        cell.stored.delete()
        threading.Timer(0.05, lambda: setattr(cell, "stored", jnp.ones(SIZE))).start()
        with within(20):
            assert_array_equal(net.large, jnp.ones(SIZE))
    finally:
        del flights[-1]


def test_reading_in_the_middle_of_the_very_call_raises() -> None:
    net, opt = make()
    only_steps(net, opt)()
    ident = threading.get_ident()
    flights[ident] = pipeline_of(opt)
    try:
        net._cells["large"].stored.delete()
        with within(20), pytest.raises(RuntimeError, match="in the middle of the very call"):
            _ = net.large
    finally:
        del flights[ident]
    with pytest.raises(RuntimeError, match="deleted"):  # what the user has given away, nobody waits for
        private([net._cells["large"]])


def test_a_read_that_falls_between_two_calls_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call deletes what was read and ends; the second begins when the reader asks whether one is in flight."""
    net, _ = make()
    (cell,) = [cell for _, _, _, cell in net._entries() if cell.stored.shape == (3,)]

    def donate_and_replace() -> None:
        old, cell.stored = cell.stored, cell.stored + 1
        old.delete()

    copied, asked = concurrent_reads.fresh_copies, concurrent_reads.in_flight
    calls: list[str] = []

    def fresh_copies(arrays: Any) -> Any:
        calls.append("copied")
        if len(calls) == 1:
            donate_and_replace()
        elif cell.stored.is_deleted():  # the second call ends
            cell.stored = jnp.full(3, 2.0)
            return fresh_copies([cell.stored])
        return copied(arrays)

    def in_flight(cells: Any) -> bool:
        answer = asked(cells)
        if calls == ["copied"]:
            calls.append("asked")
            cell.stored.delete()  # the second call begins, after the answer
        return answer

    monkeypatch.setattr(concurrent_reads, "fresh_copies", fresh_copies)
    monkeypatch.setattr(concurrent_reads, "in_flight", in_flight)
    (value,) = private([cell])
    assert np.array(value).tolist() in ([1.0] * 3, [2.0] * 3)


def test_an_array_that_its_user_deleted_is_an_error() -> None:
    net, _ = make()
    (cell,) = [cell for _, _, _, cell in net._entries() if cell.stored.shape == (3,)]
    cell.stored.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        private([cell])
