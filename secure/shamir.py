"""Shamir's secret sharing (Communications of the ACM 22(11), 1979) of 16-byte secrets over a prime field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

from propolis.secure.errors import PeerError, Refusal, UsageError

# The largest prime below 2^128: an element takes 16 bytes. A prime above would take every string of 16 bytes for a
# secret, and 17 bytes for each share; instead, secrets are drawn from the field (`draw_secret`).
PRIME = 2**128 - 159
SECRET_BYTES = SHARE_BYTES = 16

# Elements are reduced from this many random bytes: their bias is below 2^-127.
_DRAWN_BYTES = 32

RandomBytes = Callable[[int], bytes]


def draw_secret(random_bytes: RandomBytes) -> bytes:
    """A secret that can be shared: 16 bytes, a uniform element of the field."""
    return _draw(random_bytes).to_bytes(SECRET_BYTES, "big")


def split(secret: bytes, threshold: int, xs: Sequence[int], random_bytes: RandomBytes) -> list[bytes]:
    """Shares of a secret, one for each of `xs`.

    Args:
        secret: 16 bytes, an element of the field: from `draw_secret`.
        threshold: t; any t shares give the secret, t - 1 say nothing of it.
        xs: the holders' points, distinct and not zero.
        random_bytes: the source of randomness, such as `os.urandom`.

    Returns:
        f(x) for each x, 16 bytes each, where f is random of degree t - 1 and f(0) is the secret.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(xs):
        raise UsageError(f"need 16 bytes and 1 <= threshold <= {len(xs)}, got {len(secret)} and {threshold}")
    if int.from_bytes(secret, "big") >= PRIME:
        raise UsageError("the secret is no element of the field: draw it with draw_secret")
    _require_points(xs)
    coefficients = [*(_draw(random_bytes) for _ in range(threshold - 1)), int.from_bytes(secret, "big")]
    return [_evaluate(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in xs]


def combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret from exactly as many shares as its threshold.

    Args:
        shares: pairs of a holder's point and its share.

    Raises:
        PeerError: a share is malformed, or two have one point. Shares that do not belong together give some other
            secret: whoever combines them has something to compare it with.
    """
    for x, share in shares:
        if len(share) != SHARE_BYTES or int.from_bytes(share, "big") >= PRIME:
            raise PeerError(Refusal.SHARES, f"the share at {x} is not an element of the field")
    xs = tuple(x for x, _ in shares)
    _require_points(xs)
    ys = (int.from_bytes(share, "big") for _, share in shares)
    secret = sum(weight * y for weight, y in zip(_weights_at_zero(xs), ys, strict=True)) % PRIME
    return secret.to_bytes(SECRET_BYTES, "big")


def _draw(random_bytes: RandomBytes) -> int:
    return int.from_bytes(random_bytes(_DRAWN_BYTES), "big") % PRIME


def _evaluate(coefficients: Sequence[int], x: int) -> int:
    """Horner's rule, highest power first."""
    value = 0
    for coefficient in coefficients:
        value = (value * x + coefficient) % PRIME
    return value


@lru_cache(maxsize=1024)
def _weights_at_zero(xs: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights for x = 0: x_1 ... x_t / (x_i prod_(j != i) (x_j - x_i)), with one inversion for all."""
    denominators = [x * prod(other - x for other in xs if other != x) % PRIME for x in xs]
    inverse = pow(prod(denominators), -1, PRIME)
    prefixes = [1]
    for denominator in denominators[:-1]:
        prefixes.append(prefixes[-1] * denominator % PRIME)
    inverses = []
    for denominator, prefix in zip(reversed(denominators), reversed(prefixes), strict=True):
        inverses.append(inverse * prefix % PRIME)
        inverse = inverse * denominator % PRIME
    numerator = prod(xs) % PRIME
    return tuple(numerator * each % PRIME for each in reversed(inverses))


def _require_points(xs: Sequence[int]) -> None:
    if not xs or len(set(xs)) != len(xs) or any(not 0 < x < PRIME for x in xs):
        raise PeerError(Refusal.SHARES, "the points of the shares must be distinct and not zero")
