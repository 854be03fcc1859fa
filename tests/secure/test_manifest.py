"""What a release says, and in which order it is checked. What is refused is in attacks/test_packages.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from propolis.protos import model_pb2
from propolis.secure.envelope import sealed_size
from propolis.secure.errors import PeerError, Refusal, RefusedError, TrustError
from propolis.secure.identity import Root, Roster, SigningKey, TrustedRoster
from propolis.secure.manifest import (
    LARGEST_PLAINTEXT,
    LONGEST_FILE_NAME,
    MOST_FILES,
    Expected,
    Kind,
    Manifest,
    Measure,
    PackagedFile,
    Release,
    Trial,
    Trust,
    accept,
    accept_again,
    sign_manifest,
)
from propolis.secure.release import delegate
from propolis.secure.wire import decode, encode

ROOT, KEY = Root(SigningKey.generate()), SigningKey.generate()
TRUST = Trust(ROOT.public_key, TrustedRoster(ROOT.public_key, ROOT.sign_roster(Roster(ROOT.federation, 1, 2000, ()))))
DELEGATION = delegate(ROOT, 1, KEY.public, 1000, 1000)
NOW = 1500.0
MANIFEST = Manifest(
    federation=ROOT.federation,
    name="faces",
    sequence=5,
    model_version=3,
    plaintext_digest=bytes(32),
    plaintext_size=10,
    ciphertext_digest=bytes(32),
    ciphertext_size=sealed_size(10),
    key_commitment=bytes(32),
    parent=4,
    run_id=b"run",
    round=30,
    epsilon=1.5,
    delta=1e-5,
    evaluation=(Measure("accuracy", 0.93), Measure("loss", -0.0)),
    created=1400,
    expires=1600,
    files=(PackagedFile("model.onnx", 10, bytes(32), Kind.ONNX),),
)


def released(**changes: Any) -> Release:
    return Release(DELEGATION, sign_manifest(replace(MANIFEST, **changes), KEY))


def refusal_of(release: Release, expected: Expected) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        accept(release, TRUST, expected)
    return caught.value.refusal


def test_a_manifest_says_what_was_signed() -> None:
    release = released()
    accepted = accept(release, TRUST, Expected(NOW, 10, "faces", 4, bytes(32)))
    assert accepted.manifest == MANIFEST
    assert (accepted.digest, accepted.serial) == (release.digest, 1)
    assert accept_again(release, TRUST) == accepted
    assert MANIFEST.trial == Trial(1e-3, 60.0)


def test_the_newest_one_may_be_tried_again_and_no_other_of_its_number() -> None:
    release = released()
    assert accept(release, TRUST, Expected(NOW, 10, None, 5, release.digest)).manifest == MANIFEST
    assert refusal_of(release, Expected(NOW, 10, None, 5, bytes(32))) is Refusal.ROLLED_BACK
    assert refusal_of(release, Expected(NOW, 10, None, 6, release.digest)) is Refusal.ROLLED_BACK


def test_what_was_accepted_holds_when_its_time_is_over() -> None:
    assert refusal_of(released(expires=1499), Expected(NOW, 10)) is Refusal.EXPIRED
    assert accept_again(released(expires=1499), TRUST).manifest.expires == 1499


def test_checks_come_in_their_order() -> None:
    """Who, for whom, when, whether newer, and then what: an attacker learns of nothing behind a check that fails."""
    everything_wrong = {"name": "voices", "expires": 1, "sequence": 1, "parent": 0, "plaintext_size": 11}
    expected = Expected(NOW, 10, "faces", 4, bytes(32))
    late = replace(expected, now=5000.0)
    assert refusal_of(released(**everything_wrong), late) is Refusal.ROSTER
    by_stranger = Release(DELEGATION, sign_manifest(replace(MANIFEST, **everything_wrong), SigningKey.generate()))
    assert refusal_of(by_stranger, expected) is Refusal.RELEASE_KEY
    for right, refusal in [
        ({"name": "faces"}, Refusal.EXPIRED),
        ({"expires": 1600}, Refusal.ROLLED_BACK),
        ({"sequence": 5}, Refusal.POLICY),
        ({"plaintext_size": 10, "ciphertext_size": 10}, Refusal.MALFORMED),
    ]:
        before = refusal_of(released(**everything_wrong), expected)
        everything_wrong |= right
        assert refusal_of(released(**everything_wrong), expected) is refusal is not before


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"delta": 1.5},
        {"evaluation": (Measure("loss", float("nan")),)},
        {"trial": Trial(float("nan"), 1)},
        {"trial": Trial(1, 0)},
        {"version": 2},
        {"sequence": 0, "parent": 0},
        {"plaintext_digest": bytes(31)},
        {"name": "a" * 65},
        {"files": (PackagedFile("f" * (LONGEST_FILE_NAME + 1), 10, bytes(32), 1),)},
    ],
)
def test_fields_out_of_their_bounds_are_refused(changes: dict[str, Any]) -> None:
    assert refusal_of(released(**changes), Expected(NOW, 10)) is Refusal.MALFORMED


def test_the_largest_manifest_can_be_verified_and_a_larger_one_is_not_parsed() -> None:
    files = tuple(PackagedFile(f"{n:0{LONGEST_FILE_NAME}}", 2**26, bytes(32), Kind.OTHER) for n in range(MOST_FILES))
    sizes = {"plaintext_size": LARGEST_PLAINTEXT, "ciphertext_size": sealed_size(LARGEST_PLAINTEXT)}
    measures = tuple(Measure(f"{n:064}", -1.0) for n in range(256))
    accept(released(files=files, evaluation=measures, **sizes), TRUST, Expected(NOW, LARGEST_PLAINTEXT))
    wide = tuple(Measure("\u20ac" * 64, float(n)) for n in range(1, 257))
    with pytest.raises(PeerError, match=r"a manifest of \d+ bytes"):
        accept(released(files=files, evaluation=wide * 2, **sizes), TRUST, Expected(NOW, LARGEST_PLAINTEXT))


def test_bytes_that_nobody_would_write_are_no_manifest_although_they_are_signed() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from propolis.secure import labels
    from propolis.secure.identity import Signed

    payload = encode(MANIFEST, model_pb2.Manifest) + b"\xf8\x07\x01"  # a field that there is not
    assert decode(Manifest, payload, model_pb2.Manifest) == MANIFEST
    signature = Ed25519PrivateKey.from_private_bytes(KEY.private).sign(labels.joined(labels.MANIFEST, payload))
    assert refusal_of(Release(DELEGATION, Signed(payload, signature)), Expected(NOW, 10)) is Refusal.MALFORMED


def test_a_manifest_is_no_delegation_and_a_delegation_no_manifest() -> None:
    swapped = Release(released().manifest, DELEGATION)
    with pytest.raises(TrustError):
        accept_again(swapped, TRUST)
