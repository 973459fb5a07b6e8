"""What pytest has to do for `oracle.py`: begin and end a test's session, compare or write the record, count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oracle import HAS_TORCH, NEEDS_TORCH
from oracle_record import Session, State, begin, end, keep, save

OF_TORCH = ("test_torch_adapter",)  # how files begin that are left out where there is no torch


LEAST = 7600  # so many tests of the whole suite must run where there is no torch


class Plugin:
    """Begins and ends the sessions, compares or writes the record, and says how many tests need torch."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.session: Session | None = None
        self.records = bool(config.getoption("--record-torch"))
        if self.records and not HAS_TORCH:
            raise pytest.UsageError("--record-torch needs torch: pip install -e '.[oracles]'")

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: Any) -> Any:
        if isinstance(collector, pytest.Module):
            State.file = collector.path.stem
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        hypothetical = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        slow = item.get_closest_marker("slow") is not None
        begin(item.path.stem, item.nodeid.partition("::")[2], not (slow or hypothetical))
        self.session = State.session
        try:
            return (yield)
        finally:
            end()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        out = yield
        if self.session is not None:
            self.session.passed = True
        return out

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: Any) -> Any:
        session = self.session
        if session is not None:
            session.ends = True
        out = yield
        if session is None or not session.passed or not HAS_TORCH:
            return out
        if self.records:
            keep(session)
        elif session.recordable and session.done and (why := session.differs()) is not None:
            pytest.fail(f"{session.name} {why}: if that is right, run pytest --record-torch", pytrace=False)
        return out

    def pytest_sessionfinish(self, session: Any) -> None:
        if self.records:
            save()
        if not HAS_TORCH and not hasattr(self.config, "workerinput") and self._is_whole():
            ran, least = self._count("passed") + self._count("failed"), LEAST
            if ran < least and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if HAS_TORCH:
            return
        reasons = [str(report.longrepr[2]) for report in self._stats("skipped") if isinstance(report.longrepr, tuple)]
        needing = sum(NEEDS_TORCH in reason or "could not import 'torch'" in reason for reason in reasons)
        ran, least = self._count("passed") + self._count("failed"), LEAST
        left_out = sum(path.name.startswith(OF_TORCH) for path in Path(__file__).parent.glob("test_*.py"))
        terminalreporter.write_line(
            f"{ran} tests ran without torch; {needing} more, and {left_out} files, need it: pip install -e '.[oracles]'"
        )
        if self._is_whole() and ran < least:
            terminalreporter.write_line(
                f"of the whole suite at least {least} must run (LEAST in oracle_plugin.py)", red=True
            )

    def _stats(self, outcome: str) -> list[Any]:
        reporter: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        return [report for report in reporter.stats.get(outcome, []) if hasattr(report, "longrepr")]

    def _count(self, outcome: str) -> int:
        return len(self._stats(outcome))

    def _is_whole(self) -> bool:
        """Whether these are all the tests that `pytest` alone runs."""
        given = self.config.invocation_params.args
        return not any(arg in ("-k", "-m", "--lf", "--deselect") or not arg.startswith("-") for arg in given)
