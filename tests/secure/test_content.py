"""The content of a package comes out as it went in; its key is for one device and one manifest."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.protos import model_pb2
from propolis.secure import labels
from propolis.secure.content import (
    WRAPPED_BYTES,
    WrappedKey,
    checked_chunks,
    ciphertext_digest,
    content_context,
    open_files,
    require_chunk_digests,
    unwrap_key,
    wrap_key,
)
from propolis.secure.envelope import (
    CHUNK_BYTES,
    chunk_count,
    commit_to,
    new_content_key,
    seal,
    seal_content,
    sealed_size,
)
from propolis.secure.errors import Refusal, TrustError
from propolis.secure.identity import agreement_key
from propolis.secure.kem import Kem, hybrid_key
from propolis.secure.manifest import Accepted, Kind, Manifest, PackagedFile
from propolis.secure.wire import decode, encode

KEY, FEDERATION = new_content_key(), bytes(32)


def packed(contents: list[bytes]) -> tuple[Manifest, list[bytes]]:
    """A manifest of these files, and their ciphertext in chunks."""
    plaintext = b"".join(contents)
    digest, size = hashlib.sha256(plaintext).digest(), len(plaintext)
    parts = [plaintext[i : i + CHUNK_BYTES] for i in range(0, size, CHUNK_BYTES)]
    chunks = list(seal_content(KEY, content_context(FEDERATION, "faces", 1, digest), parts, chunk_count(size)))
    files = tuple(
        PackagedFile(f"file-{i}", len(content), hashlib.sha256(content).digest(), Kind.OTHER)
        for i, content in enumerate(contents)
    )
    digests = ciphertext_digest(digests_of(chunks))
    manifest = Manifest(
        *(FEDERATION, "faces", 1, 0, digest, size, digests, sealed_size(size), commit_to(KEY)),
        *(0, b"", 0, 0.0, 0.0, (), 0, 0, files),
    )
    return manifest, chunks


def digests_of(chunks: list[bytes]) -> bytes:
    return b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)


@given(st.lists(st.integers(min_value=0, max_value=2 * CHUNK_BYTES), min_size=1, max_size=4).filter(sum))
@settings(deadline=None, max_examples=25)
def test_files_come_out_as_they_went_in_wherever_chunks_end(sizes: list[int]) -> None:
    contents = [(bytes([65 + i]) * size) for i, size in enumerate(sizes)]
    manifest, chunks = packed(contents)
    files = open_files(manifest, KEY, checked_chunks(chunks, digests_of(chunks)))
    assert list(files.values()) == contents
    assert all(isinstance(content, bytes) for content in files.values())


def test_more_or_less_than_the_manifest_says_does_not_open() -> None:
    manifest, chunks = packed([b"a" * CHUNK_BYTES, b"b"])
    for files in (manifest.files[:1], manifest.files[::-1], (*manifest.files, replace(manifest.files[1], name="more"))):
        with pytest.raises(TrustError) as caught:
            open_files(replace(manifest, files=files), KEY, chunks)
        assert caught.value.refusal is Refusal.PACKAGE


def test_a_content_is_bound_to_its_release() -> None:
    manifest, chunks = packed([b"content"])
    for changes in (
        {"sequence": 2},
        {"name": "voices"},
        {"federation": bytes([1]) * 32},
        {"plaintext_digest": bytes(32)},
    ):
        with pytest.raises(TrustError, match="does not open"):
            open_files(replace(manifest, **changes), KEY, chunks)  # type: ignore[arg-type]


def test_all_chunks_come_or_the_last_one_is_missed() -> None:
    manifest, chunks = packed([bytes(CHUNK_BYTES + 1)])
    digests = digests_of(chunks)
    require_chunk_digests(manifest, digests)
    for changed in (chunks[:1], [], [*chunks, b""], chunks[::-1]):
        with pytest.raises(TrustError):
            list(checked_chunks(changed, digests))
    for wrong in (digests[:32], digests + bytes(32), digests[32:] + digests[:32]):
        with pytest.raises(TrustError):
            require_chunk_digests(manifest, wrong)
    with pytest.raises(TrustError, match="another number of chunks"):
        require_chunk_digests(replace(manifest, ciphertext_digest=ciphertext_digest(digests[:32])), digests[:32])


NEW_KEY = {Kem.X25519: agreement_key, Kem.MLKEM768_X25519: hybrid_key}


@pytest.mark.parametrize(("kem", "size"), [(Kem.X25519, 80), (Kem.MLKEM768_X25519, 1168)])
def test_a_key_opens_for_one_device_one_manifest_and_one_commitment(kem: Kem, size: int) -> None:
    private, public = NEW_KEY[kem]()
    manifest = replace(packed([b"content"])[0], kem=int(kem))
    accepted = Accepted(manifest, b"m" * 32, 1)
    wrapped = wrap_key(KEY, accepted.digest, 7, b"d" * 32, public, kem)
    assert unwrap_key(wrapped, accepted, b"d" * 32, private) == KEY
    assert decode(WrappedKey, encode(wrapped, model_pb2.WrappedKey), model_pb2.WrappedKey) == wrapped
    assert len(wrapped.sealed) == WRAPPED_BYTES[kem] == size
    for other, descriptor, key in [
        (replace(accepted, digest=b"n" * 32), b"d" * 32, private),
        (accepted, b"e" * 32, private),
        (accepted, b"d" * 32, NEW_KEY[kem]()[0]),
        (replace(accepted, manifest=replace(manifest, key_commitment=bytes(32))), b"d" * 32, private),
    ]:
        with pytest.raises(TrustError) as caught:
            unwrap_key(wrapped, other, descriptor, key)
        assert caught.value.refusal is Refusal.PACKAGE


def test_a_key_is_sealed_in_the_way_that_the_manifest_says() -> None:
    """Also where its size fits, and where the device has both keys: neither kind passes for the other."""
    keys = {kem: NEW_KEY[kem]() for kem in Kem}
    manifest, _ = packed([b"content"])
    for said, other in ((Kem.X25519, Kem.MLKEM768_X25519), (Kem.MLKEM768_X25519, Kem.X25519)):
        accepted = Accepted(replace(manifest, kem=int(said)), b"m" * 32, 1)
        wrapped = wrap_key(KEY, accepted.digest, 7, b"d" * 32, keys[other][1], other)
        with pytest.raises(TrustError, match="not sealed in the way that the manifest says"):
            unwrap_key(wrapped, accepted, b"d" * 32, keys[said][0])
        fitted = replace(wrapped, sealed=wrapped.sealed.ljust(WRAPPED_BYTES[said], b"\0")[: WRAPPED_BYTES[said]])
        with pytest.raises(TrustError, match="does not open"):
            unwrap_key(fitted, accepted, b"d" * 32, keys[said][0])


def test_a_hybrid_key_that_is_cut_or_lengthened_does_not_open() -> None:
    private, public = hybrid_key()
    accepted = Accepted(replace(packed([b"content"])[0], kem=2), b"m" * 32, 1)
    wrapped = wrap_key(KEY, accepted.digest, 7, b"d" * 32, public, Kem.MLKEM768_X25519)
    for sealed in (wrapped.sealed[:-1], wrapped.sealed[1:], wrapped.sealed + b"\0", wrapped.sealed[:80], b""):
        with pytest.raises(TrustError, match="not sealed in the way"):
            unwrap_key(replace(wrapped, sealed=sealed), accepted, b"d" * 32, private)


def test_a_wrapped_key_is_bound_to_the_digest_of_the_hybrid_key() -> None:
    """A descriptor does not hold the hybrid key, so what it is sealed to is said in the context too."""
    private, public = hybrid_key()
    accepted = Accepted(replace(packed([b"content"])[0], kem=2), b"m" * 32, 1)
    unbound = labels.joined(labels.WRAPPED_KEY, accepted.digest, b"d" * 32)
    wrapped = WrappedKey(accepted.digest, 7, seal(KEY, public, unbound, Kem.MLKEM768_X25519))
    with pytest.raises(TrustError, match="does not open"):
        unwrap_key(wrapped, accepted, b"d" * 32, private)
