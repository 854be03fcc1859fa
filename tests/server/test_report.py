from __future__ import annotations

from io import StringIO

from rich.console import Console

from harness import Blobs
from propolis.server.checkpoint import RoundRecord, RunState
from propolis.server.model import GlobalModel
from propolis.server.report import TerminalReport


def test_what_a_device_said_rules_no_terminal() -> None:
    record = RoundRecord(1, 0.5, 1.25, 10, 20, 3, 1, 0.125, 1, ["\x1b]0;owned\x07[red]"], {})
    shown = StringIO()
    with TerminalReport(1, 0, Console(file=shown, width=100)) as report:
        report.round_finished(RunState(GlobalModel.of(Blobs().model()), (record,), {}))
    assert "a device failed: \\x1b]0;owned\\x07[red]" in shown.getvalue()
    assert all(line.isprintable() for line in shown.getvalue().splitlines())
