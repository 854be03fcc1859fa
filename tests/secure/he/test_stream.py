"""Vectors of any length are encrypted, added up device by device, and opened whole."""

from __future__ import annotations

import numpy as np
import pytest
from encrypting import adder, decryptor, drawn, encryptor, scheme, summed, tags, upload

from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.he.stream import Declared, Totals, encrypt_vector, open_vector
from propolis.secure.he.tag import tag_bytes


@pytest.mark.parametrize("seeded", [False, True], ids=["public", "seeded"])
@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [1, 3])
def test_vectors_of_any_length_add_up(seeded: bool, more: int, chunks: int) -> None:
    made = scheme(10, 8, seeded)
    count = chunks * made.parameters.values + more
    vectors = [drawn(made, count, device) for device in range(3)]
    sent = [upload(made, device, vector) for device, vector in enumerate(vectors)]
    assert len(sent[0]) == chunks + (more > 0)
    opened = open_vector(summed(made, sent), decryptor(made), tags(made, len(sent[0])), Declared(range(3), 3, count))
    np.testing.assert_array_equal(opened, sum(vectors))


def test_an_upload_is_added_whole_or_not_at_all() -> None:
    made = scheme()
    count = 2 * made.parameters.values
    sent = [upload(made, device, drawn(made, count, device)) for device in range(3)]
    totals = Totals(adder(made), 2)
    for good, bad in ((sent[0], sent[1][:1]), (sent[1], [*sent[2], sent[2][0]]), (sent[2], [sent[0][0], b"?"])):
        totals.add(good)
        with pytest.raises(PeerError) as caught:
            totals.add(bad)
        assert caught.value.refusal is Refusal.MALFORMED
    assert totals.uploads == 3
    assert list(totals.ciphertexts()) == summed(made, sent)


def test_an_upload_that_takes_the_others_away_changes_nothing() -> None:
    made = scheme()
    sent = [upload(made, device, drawn(made, 2 * made.parameters.values, device)) for device in range(2)]
    totals, adds = Totals(adder(made), 2), adder(made)
    totals.add(sent[0])
    minus = made._seal.Ciphertext(made._context)
    size = made.upload_bytes
    made._seal.Evaluator(made._context).negate(adds.read(sent[0][1][:size]), minus)
    with pytest.raises(PeerError, match="takes the others away"):
        totals.add([sent[1][0], adds.write(minus) + sent[1][1][size:]])
    assert (totals.uploads, list(totals.ciphertexts())) == (1, sent[0])


def test_an_endless_upload_is_not_read_to_its_end() -> None:
    made = scheme()
    one = upload(made, 0, drawn(made, 1, 0))[0]
    taken = []

    def endless() -> object:
        while True:
            taken.append(1)
            yield one

    with pytest.raises(PeerError, match="more than 2"):
        Totals(adder(made), 2).add(endless())  # type: ignore[arg-type]
    assert len(taken) == 3


def test_no_more_devices_are_added_than_there_is_room_for() -> None:
    made = scheme(2, 16)
    sent = upload(made, 0, drawn(made, 1, 0))
    totals = Totals(adder(made), 1)
    with pytest.raises(UsageError, match="nothing has been added up"):
        totals.ciphertexts()
    totals.add(sent)
    totals.add(sent)
    with pytest.raises(UsageError, match="room for 2 devices"):
        totals.add(sent)


def test_counts_that_do_not_fit_are_refused() -> None:
    made = scheme()
    with pytest.raises(UsageError, match="fill 2 chunks, not 1"):
        next(encrypt_vector(drawn(made, made.parameters.values + 1, 0), encryptor(made), tags(made, 1), 0))
    with pytest.raises(UsageError, match="do not fill 1 chunks"):
        open_vector([], decryptor(made), tags(made, 1), Declared(range(3), 3, made.parameters.values + 1))


def test_ciphertexts_are_made_as_they_are_asked_for() -> None:
    made = scheme()
    values = drawn(made, 2 * made.parameters.values, 0)
    values[-1] = 2**15  # out of range, in the second chunk
    stream = encrypt_vector(values, encryptor(made), tags(made, 2), 0)
    assert len(next(stream)) == made.upload_bytes + tag_bytes(made.parameters)
    with pytest.raises(UsageError, match="outside of 16 bits"):
        next(stream)


def test_tags_that_are_none_are_refused() -> None:
    made = scheme()
    (good,) = upload(made, 0, drawn(made, 1, 0))
    for bad in (b"", good[:-1], good + bytes(1), good[:-8] + b"\xff" * 8, good[: made.upload_bytes]):
        with pytest.raises(PeerError) as caught:
            Totals(adder(made), 1).add([bad])
        assert caught.value.refusal in (Refusal.MALFORMED, Refusal.HE_KEY)
