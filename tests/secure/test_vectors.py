"""Our recipes against the published vectors of their primitives, as shipped in `cryptography_vectors`."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from protocol import pairwise_mask

from propolis.protos import identity_pb2 as pb
from propolis.secure import labels
from propolis.secure.envelope import open_sealed
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.identity import Prekey, SigningKey, sign
from propolis.secure.kem import Kem, hybrid_public
from propolis.secure.prg import key_stream
from propolis.secure.secagg.masks import _derive, index_bytes, public_half

VECTORS = files("cryptography_vectors")

# NIST SP 800-38A, F.5.5 (CTR-AES256.Encrypt): its counter starts with 0xf0, the number of our stream.
NIST_KEY = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
NIST_COUNTER = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"
NIST_PLAINTEXT = (
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
NIST_CIPHERTEXT = (
    "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
    "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
)

# RFC 7748, section 6.1.
ALICE = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
ALICE_PUBLIC = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
BOB = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"
BOB_PUBLIC = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
ALICE_AND_BOB = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def records(*path: str) -> Iterator[dict[str, str]]:
    """The `NAME = VALUE` blocks of a vector file, each from its COUNT line."""
    block: dict[str, str] = {}
    for line in VECTORS.joinpath(*path).read_text().splitlines():
        name, equals, value = (part.strip() for part in line.partition("="))
        if name == "COUNT" and block:
            yield block
            block = {}
        if equals and not line.startswith("#"):
            block[name] = value
    yield block


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256 and no salt, for up to 32 bytes."""
    pseudorandom_key = hmac.digest(bytes(32), secret, hashlib.sha256)
    return hmac.digest(pseudorandom_key, info + b"\1", hashlib.sha256)


def assert_ctr(key: str, counter: str, plaintext: str, ciphertext: str) -> None:
    start, plain = int(counter, 16), bytes.fromhex(plaintext)
    stream = key_stream(bytes.fromhex(key), start >> 120, (start & (1 << 120) - 1) * 16)
    assert stream.update(plain) == bytes.fromhex(ciphertext)


def test_key_stream_against_rfc_3686() -> None:
    vectors = list(records("ciphers", "AES", "CTR", "aes-256-ctr.txt"))
    assert len(vectors) == 3
    for each in vectors:
        assert_ctr(each["KEY"], each["IV"], each["PLAINTEXT"], each["CIPHERTEXT"])


def test_key_stream_against_nist_sp_800_38a() -> None:
    assert_ctr(NIST_KEY, NIST_COUNTER, NIST_PLAINTEXT, NIST_CIPHERTEXT)


def test_derive_against_rfc_5869() -> None:
    """Of the SHA-256 cases only the third has no salt; its key is longer than ours, and ours is its beginning."""
    vectors = [each for each in records("KDF", "rfc-5869-HKDF-SHA256.txt") if not each["salt"]]
    assert len(vectors) == 1
    for each in vectors:
        secret, info = bytes.fromhex(each["IKM"]), bytes.fromhex(each["info"])
        assert _derive(secret, info) == hkdf(secret, info) == bytes.fromhex(each["OKM"])[:32]


@pytest.mark.parametrize("info", [b"", b"info", bytes(1000)])
def test_derive_is_bound_to_its_context(info: bytes) -> None:
    assert _derive(b"secret", info) == hkdf(b"secret", info)


def seed_from(own_private: bytes, other_key: bytes, shared: bytes) -> tuple[bytes, bytes]:
    """The seed of `pairwise_mask`, and what it must be for this X25519 output."""
    own_key = public_half(own_private)
    context = (index_bytes(3), own_key, index_bytes(5), other_key)
    expected = hkdf(shared, labels.joined(labels.PAIRWISE_MASK, b"plan", *context, b"input"))
    return pairwise_mask(3, own_private, 5, other_key, b"plan", b"input").seed, expected


def test_key_agreement_against_rfc_7748_section_5() -> None:
    vectors = list(records("asymmetric", "X25519", "rfc7748.txt"))
    assert len(vectors) == 3
    for each in vectors:
        scalar, u, output = (bytes.fromhex(each[name]) for name in ("INPUT_SCALAR", "INPUT_U", "OUTPUT_U"))
        seed, expected = seed_from(scalar, u, output)
        assert seed == expected
        if u == b"\x09" + bytes(31):  # the base point
            assert public_half(scalar) == output


def test_key_agreement_against_rfc_7748_section_6() -> None:
    alice, bob = bytes.fromhex(ALICE), bytes.fromhex(BOB)
    assert public_half(alice).hex() == ALICE_PUBLIC
    assert public_half(bob).hex() == BOB_PUBLIC
    seed, expected = seed_from(alice, public_half(bob), bytes.fromhex(ALICE_AND_BOB))
    assert seed == expected
    assert pairwise_mask(5, bob, 3, public_half(alice), b"plan", b"input").seed == seed


# The points whose order divides 8 (RFC 7748, section 6.1 asks to refuse them): u = 0, 1, p - 1, p and p + 1.
LOW_ORDER = [value.to_bytes(32, "little") for value in (0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18)]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_mask_keys_of_low_order_are_refused(point: bytes) -> None:
    with pytest.raises(PeerError, match="device 5 is of low order") as caught:
        pairwise_mask(3, bytes.fromhex(BOB), 5, point, b"plan", b"input")
    assert caught.value.refusal is Refusal.KEYS


def test_signing_keys_and_signatures_against_rfc_8032() -> None:
    lines = VECTORS.joinpath("asymmetric", "Ed25519", "sign.input").read_text().splitlines()
    assert len(lines) > 20
    for line in lines:
        pair, public, _, _, _ = line.split(":")
        assert SigningKey(bytes.fromhex(pair[:64])).public.hex() == public


@pytest.mark.parametrize("line", [0, 1, 2])
def test_signing_a_payload_against_rfc_8032(line: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the label and the encoding taken out of the way, `sign` makes the very signatures of the vectors."""
    lines = VECTORS.joinpath("asymmetric", "Ed25519", "sign.input").read_text().splitlines()
    pair, _, message, signature, _ = (bytes.fromhex(part) for part in lines[line].split(":"))
    monkeypatch.setattr(labels, "joined", lambda label, payload: message)
    signed = sign(b"", pair[:32], Prekey(0, bytes(32)), pb.Prekey)
    assert signed.signature == signature[:64]


def hpke_vectors() -> list[dict[str, Any]]:
    """RFC 9180, A.1: base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-128-GCM."""
    vectors = json.loads(VECTORS.joinpath("HPKE", "test-vectors.json").read_text())
    suite = {"mode": 0, "kem_id": 0x20, "kdf_id": 1, "aead_id": 1}
    return [each for each in vectors if suite.items() <= each.items()]


def test_envelope_against_rfc_9180() -> None:
    """All of the RFC's encryptions have associated data, ours none: the RFC's key and nonce make the ciphertext."""
    (vector,) = hpke_vectors()
    fields = ("enc", "skRm", "pkRm", "info", "key", "base_nonce")
    enc, private, public, info, key, nonce = (bytes.fromhex(vector[name]) for name in fields)
    aad, plaintext, published = (bytes.fromhex(vector["encryptions"][0][name]) for name in ("aad", "pt", "ct"))
    assert AESGCM(key).encrypt(nonce, plaintext, aad) == published
    sealed = enc + AESGCM(key).encrypt(nonce, plaintext, b"")
    assert open_sealed(sealed, private, info) == plaintext
    assert public_half(private) == public
    with pytest.raises(PeerError):
        open_sealed(enc + published, private, info)


def hybrid_vector() -> dict[str, bytes]:
    """draft-ietf-hpke-pq: base, MLKEM768-X25519, HKDF-SHA256; with ChaCha20-Poly1305, ours has AES-256-GCM."""
    vectors = json.loads(VECTORS.joinpath("HPKE", "hpke-pq-test-vectors.json").read_text())
    suite = {"mode": 0, "kem_id": 0x647A, "kdf_id": 1, "aead_id": 3}
    (vector,) = (each for each in vectors if suite.items() <= each.items())
    fields = ("enc", "skRm", "pkRm", "info", "shared_secret", "key", "base_nonce")
    return {name: bytes.fromhex(vector[name]) for name in fields}


def key_schedule(secret: bytes, info: bytes, aead_id: int) -> tuple[bytes, bytes]:
    """Key and nonce of RFC 9180, section 5.1, in base mode, for a KEM secret of MLKEM768-X25519 and HKDF-SHA256."""
    suite = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (0x647A, 1, aead_id))

    def extract(salt: bytes, label: bytes, material: bytes) -> bytes:
        return hmac.digest(salt, b"HPKE-v1" + suite + label + material, "sha256")

    def expand(key: bytes, label: bytes, context: bytes, length: int) -> bytes:
        labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + context
        return hmac.digest(key, labelled + b"\1", "sha256")[:length]

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    scheduled = extract(secret, b"secret", b"")
    return expand(scheduled, b"key", context, 32), expand(scheduled, b"base_nonce", context, 12)


def test_the_hybrid_envelope_against_the_drafts_vector() -> None:
    """The vector's seed makes both halves of a key (draft-irtf-cfrg-concrete-hybrid-kems, SHAKE-256)."""
    vector = hybrid_vector()
    private = hashlib.shake_256(vector["skRm"]).digest(96)
    assert hybrid_public(private) == vector["pkRm"]
    secret, info = vector["shared_secret"], vector["info"]
    assert key_schedule(secret, info, 3) == (vector["key"], vector["base_nonce"])
    key, nonce = key_schedule(secret, info, 2)
    sealed = vector["enc"] + AESGCM(key).encrypt(nonce, b"content key", b"")
    assert open_sealed(sealed, private, info, Kem.MLKEM768_X25519) == b"content key"
