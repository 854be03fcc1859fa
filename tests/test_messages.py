"""How the protocol rides on Flower's messages."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, RecordDict

from propolis.messages import RECORD, broadcast_in, open_record, protocol_record
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.secagg.states import Exchange


@pytest.mark.parametrize(
    "record",
    [
        {"hello": b"a", "prepare": b"b"},
        {},
        {"hello": "a"},
        {"hallo": b"a"},
        {"model": b"m"},
        {"hello": b"a", "x": b"b"},
    ],
    ids=str,
)
def test_a_record_is_one_exchange_or_malformed(record: dict[str, str | bytes]) -> None:
    with pytest.raises(PeerError) as caught:
        open_record(RecordDict({RECORD: ConfigRecord(dict(record))}))
    assert caught.value.refusal is Refusal.MALFORMED


def test_the_model_may_come_beside_the_exchange() -> None:
    content = RecordDict({RECORD: protocol_record(Exchange.UPLOAD, b"body", b"way")})
    assert open_record(content) == (Exchange.UPLOAD, b"body")
    assert broadcast_in(content) == b"way"
    assert broadcast_in(RecordDict({RECORD: protocol_record(Exchange.UPLOAD, b"body")})) == b""
    with pytest.raises(PeerError):
        broadcast_in(RecordDict({RECORD: ConfigRecord({"upload": b"body", "model": 3})}))
