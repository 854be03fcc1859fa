from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from propolis.logs import configure_logging
from propolis.secure.errors import UsageError

Captured = pytest.CaptureFixture[str]

_log = logging.getLogger("propolis.test")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def only_json(captured: Captured) -> dict[str, Any]:
    (line,) = captured.readouterr().err.splitlines()
    record: dict[str, Any] = json.loads(line, parse_constant=pytest.fail)
    return record


def test_fields_come_out_as_keys(capsys: Captured) -> None:
    configure_logging("json")
    _log.info("device %s", "connected", extra={"device": "3f2a", "attempt": 2, "sizes": [1, 2]})
    record = only_json(capsys)
    age = datetime.now(UTC) - datetime.fromisoformat(record.pop("time"))
    assert 0 <= age.total_seconds() < 60
    assert record == {
        "level": "info", "logger": "propolis.test", "message": "device connected",
        "device": "3f2a", "attempt": 2, "sizes": [1, 2],
    }  # fmt: skip


def test_text_is_one_line_with_key_value_pairs(capsys: Captured) -> None:
    configure_logging("text")
    _log.warning("device gone", extra={"device": "3f2a", "why": 'it said "no"', "empty": "", "rounds": 3})
    line = capsys.readouterr().err
    time, rest = line.split(" ", 1)
    assert datetime.fromisoformat(time).utcoffset() is not None
    assert rest == 'warning propolis.test device gone device=3f2a why="it said \\"no\\"" empty="" rounds=3\n'


def test_an_exception_is_one_field(capsys: Captured) -> None:
    configure_logging("json")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        _log.exception("failed")
    record = only_json(capsys)
    assert record["exception"].startswith("Traceback")
    assert record["exception"].endswith("ValueError: first\nsecond")


def test_an_exception_follows_its_line_of_text(capsys: Captured) -> None:
    configure_logging("text")
    _log.error("failed", exc_info=ValueError("why"), extra={"round": 3})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("failed round=3")
    assert lines[-1] == "ValueError: why"


@pytest.mark.parametrize("format_", ["text", "json"])
def test_nobody_who_is_quoted_forges_a_line(capsys: Captured, format_: Any) -> None:
    configure_logging(format_)
    _log.info("from %s", "x\n2026-01-01 error é", extra={"name_": "a\nb\u2028c"})
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"bytes", object, {"deep": float("inf")}], ids=str)
def test_any_value_can_be_logged(capsys: Captured, value: object) -> None:
    configure_logging("json")
    _log.info("odd", extra={"value": value})
    assert only_json(capsys)["value"] == str(value)


def test_a_field_does_not_hide_a_part_of_the_record(capsys: Captured) -> None:
    configure_logging("json")
    _log.info("here", extra={"level": 7, "logger": "mine"})
    record = only_json(capsys)
    assert (record["level"], record["level_"], record["logger"], record["logger_"]) == ("info", 7, _log.name, "mine")


def test_only_what_is_severe_enough_is_shown(capsys: Captured) -> None:
    configure_logging("text", "warning")
    _log.info("not this")
    assert capsys.readouterr().err == ""
    configure_logging("text", "debug")
    _log.debug("this")
    assert "this" in capsys.readouterr().err


def test_configuring_again_replaces_and_leaves_others_alone(capsys: Captured) -> None:
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    configure_logging("text")
    configure_logging("json")
    _log.info("once")
    assert only_json(capsys)["message"] == "once"
    assert other in logging.getLogger().handlers


@pytest.mark.parametrize(("format_", "level"), [("xml", "info"), ("json", "loud")])
def test_what_is_not_known_is_one_clear_line(format_: Any, level: str) -> None:
    with pytest.raises(UsageError, match=r"expected .*, got '(xml|loud)'"):
        configure_logging(format_, level)


def test_standard_output_stays_clean() -> None:
    code = "import logging; from propolis.logs import configure_logging as c; c('json'); logging.warning('here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert json.loads(done.stderr)["logger"] == "root"
