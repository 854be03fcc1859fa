"""The content of a package: its files, one after another, encrypted in chunks; and its key, sealed to each device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO

from propolis.secure import labels
from propolis.secure.envelope import (
    CONTENT_KEY_BYTES,
    chunk_count,
    commit_to,
    open_content,
    open_sealed,
    seal,
)
from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.identity import DIGEST_BYTES, LARGEST_INDEX
from propolis.secure.kem import Kem, hybrid_digest, hybrid_public
from propolis.secure.manifest import Accepted, Manifest, PackagedFile
from propolis.secure.wire import between, sized, version_field

WRAPPED_BYTES = {kem: CONTENT_KEY_BYTES + kem.overhead for kem in Kem}


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """The content key of one package, sealed to one device."""

    manifest: bytes = sized(DIGEST_BYTES)
    index: int = between(0, LARGEST_INDEX)
    sealed: bytes = sized(min(WRAPPED_BYTES.values()), max(WRAPPED_BYTES.values()))
    version: int = version_field()


def wrap_key(
    content_key: bytes, manifest: bytes, index: int, descriptor: bytes, public: bytes, kem: Kem = Kem.X25519
) -> WrappedKey:
    """The content key for one device.

    Args:
        content_key: 32 bytes.
        manifest: `Release.digest` of the package.
        index: of the device in the roster.
        descriptor: digest of the device's, 32 bytes.
        public: key of the device, of this kind.
        kem: that the manifest says.

    Raises:
        PeerError: the public key is none.
    """
    return WrappedKey(manifest, index, seal(content_key, public, _wrapping(manifest, descriptor, public, kem), kem))


def unwrap_key(wrapped: WrappedKey, accepted: Accepted, descriptor: bytes, private: bytes) -> bytes:
    """The content key, when it is the one of the manifest: nothing is decrypted with another.

    Args:
        wrapped: for this device.
        accepted: the release that it belongs to.
        descriptor: digest of this device's, 32 bytes.
        private: this device's key, of the kind that the manifest says.

    Raises:
        TrustError: it is for another package or another device, sealed in another way than the manifest says, or
            another key than the manifest commits to.
    """
    kem = Kem(accepted.manifest.kem)
    if wrapped.manifest != accepted.digest:
        raise TrustError(Refusal.PACKAGE, "the key is for another package")
    if len(wrapped.sealed) != WRAPPED_BYTES[kem]:
        raise TrustError(Refusal.PACKAGE, "the key is not sealed in the way that the manifest says")
    public = hybrid_public(private) if kem is Kem.MLKEM768_X25519 else b""
    try:
        content_key = open_sealed(wrapped.sealed, private, _wrapping(accepted.digest, descriptor, public, kem), kem)
    except PeerError:
        raise TrustError(Refusal.PACKAGE, "the key does not open: it is another device's, or damaged") from None
    if commit_to(content_key) != accepted.manifest.key_commitment:
        raise TrustError(Refusal.PACKAGE, "the key is not the one that the manifest commits to")
    return content_key


def content_context(federation: bytes, name: str, sequence: int, plaintext_digest: bytes) -> bytes:
    """What every chunk is bound to: what a manifest says before there is a ciphertext."""
    return labels.joined(labels.CONTENT, federation, name.encode(), sequence.to_bytes(8, "big"), plaintext_digest)


def ciphertext_digest(chunk_digests: bytes) -> bytes:
    """What a manifest signs in place of the digests of all chunks, which lets each be checked when it comes."""
    return labels.digest(labels.CHUNKS, chunk_digests)


def require_chunk_digests(manifest: Manifest, chunk_digests: bytes) -> None:
    """Refuse digests of chunks that are not those of the manifest; raises TrustError."""
    if ciphertext_digest(chunk_digests) != manifest.ciphertext_digest:
        raise TrustError(Refusal.PACKAGE, "the digests of the chunks are not those of the manifest")
    if len(chunk_digests) != DIGEST_BYTES * chunk_count(manifest.plaintext_size):
        raise TrustError(Refusal.PACKAGE, "the manifest is of another number of chunks than there are digests")


def require_chunk(number: int, chunk: bytes, chunk_digests: bytes) -> None:
    """Refuse a chunk of ciphertext that is not the one of this number; raises TrustError."""
    digest = chunk_digests[DIGEST_BYTES * number : DIGEST_BYTES * (number + 1)]
    if hashlib.sha256(chunk).digest() != digest:
        raise TrustError(Refusal.PACKAGE, f"chunk {number} of the package is not what was released")


def checked_chunks(chunks: Iterable[bytes], chunk_digests: bytes) -> Iterator[bytes]:
    """The chunks, each after a check as of `require_chunk`; all of them, or TrustError."""
    number = -1
    for number, chunk in enumerate(chunks):
        require_chunk(number, chunk, chunk_digests)
        yield chunk
    if DIGEST_BYTES * (number + 1) != len(chunk_digests):
        raise TrustError(Refusal.PACKAGE, f"the package ends after {number + 1} chunks")


def open_files(manifest: Manifest, content_key: bytes, chunks: Iterable[bytes]) -> dict[str, bytes]:
    """The files by name, in memory, when they are those of the manifest.

    Args:
        manifest: that was accepted: it bounds what is taken.
        content_key: from `unwrap_key`.
        chunks: of the ciphertext.

    Raises:
        TrustError: something does not open, or is not what the manifest says.
    """
    context = content_context(manifest.federation, manifest.name, manifest.sequence, manifest.plaintext_digest)
    plaintext = _Plaintext(open_content(content_key, context, chunks, chunk_count(manifest.plaintext_size)))
    files = {file.name: plaintext.take(file) for file in manifest.files}
    plaintext.require_end()
    if plaintext.digest != manifest.plaintext_digest:
        raise TrustError(Refusal.PACKAGE, "the files are not the model of the manifest")
    return files


class _Plaintext:
    """Cuts the chunks of a plaintext into files."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")
        self._whole = hashlib.sha256()

    @property
    def digest(self) -> bytes:
        """SHA-256 of all that was taken."""
        return self._whole.digest()

    def take(self, file: PackagedFile) -> bytes:
        """The next file; raises TrustError when it is not this one."""
        content, hashed = BytesIO(), hashlib.sha256()
        while (missing := file.size - content.tell()) > 0:
            part = self._next(missing)
            content.write(part)
            hashed.update(part)
            self._whole.update(part)
        if hashed.digest() != file.digest:
            raise TrustError(Refusal.PACKAGE, f"the file {file.name} is not what the manifest says")
        return content.getvalue()

    def _next(self, most: int) -> memoryview:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        if not self._rest:
            raise TrustError(Refusal.PACKAGE, "there is less in the package than the manifest says")
        part, self._rest = self._rest[:most], self._rest[most:]
        return part

    def require_end(self) -> None:
        """Refuse what comes after the last file."""
        if self._rest or next(self._chunks, None) is not None:
            raise TrustError(Refusal.PACKAGE, "there is more in the package than the manifest says")


def _wrapping(manifest: bytes, descriptor: bytes, public: bytes, kem: Kem) -> bytes:
    """The context of a wrapped key; a descriptor has the device's X25519 key in it, but not its hybrid one."""
    hybrid = () if kem is Kem.X25519 else (hybrid_digest(public),)
    return labels.joined(labels.WRAPPED_KEY, manifest, descriptor, *hybrid)
