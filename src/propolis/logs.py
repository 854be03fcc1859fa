"""Structured logs on standard error, for people or for machines, with the standard library alone.

Fields are given as the standard library gives them, ``_log.info("device connected", extra={"device": "3f2a"})``, and
come out as ``device=3f2a`` or as a key of the JSON object.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from propolis.secure.errors import UsageError

LogFormat = Literal["text", "json"]

LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)
LOG_LEVELS = ("debug", "info", "warning", "error")

# What every record has; any other attribute came from `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OURS = ("time", "level", "logger", "message", "exception")


def configure_logging(format: LogFormat = "text", level: str = "info") -> None:  # noqa: A002 (the flag's name)
    """Send the logs of this process, those of libraries included, to standard error, one line a record.

    Calling it again replaces what it did before, and leaves handlers of others alone.

    Args:
        format: "text" for people, or "json" for one object a line.
        level: the least severe that is shown: debug, info, warning or error.

    Raises:
        UsageError: there is no such format or level.
    """
    if format not in LOG_FORMATS:
        raise UsageError(f"log format: expected {' or '.join(LOG_FORMATS)}, got '{format}'")
    if level not in LOG_LEVELS:
        raise UsageError(f"log level: expected one of {', '.join(LOG_LEVELS)}, got '{level}'")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    root = logging.getLogger()
    for former in root.handlers[:]:
        if isinstance(former.formatter, _Formatter):
            root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(level.upper())


class _Formatter(logging.Formatter):
    """What both formats have in common: which fields a record has."""

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Time, level, logger and message, whatever was in `extra`, and the exception and stack where there are."""
        ours: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _STANDARD:
                ours[f"{name}_" if name in _OURS else name] = value
        exception = self.formatException(record.exc_info) if record.exc_info else record.exc_text
        trace = [part for part in (exception, record.stack_info) if part]
        return {**ours, "exception": "\n".join(trace)} if trace else ours


class _JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({name: _as_json(value) for name, value in self.fields(record).items()})


class _TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        head = [fields.pop(name) for name in _OURS[:4]]
        trace = fields.pop("exception", None)
        line = " ".join([*map(one_line, head), *(f"{name}={_as_word(value)}" for name, value in fields.items())])
        return line if trace is None else f"{line}\n{trace}"


def _as_json(value: object) -> object:
    """The value, or its text where JSON has no such thing: a log never fails for what it is given."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)
    return value


def _as_word(value: object) -> str:
    """The value as text, quoted where it would not be one word."""
    text = str(value)
    is_word = text.isprintable() and text and not set(text) & set(' "=')
    return text if is_word else one_line(json.dumps(text, ensure_ascii=False))


def one_line(text: str) -> str:
    """The text with what cannot be printed escaped: who is quoted forges no line of a log and rules no terminal."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)
