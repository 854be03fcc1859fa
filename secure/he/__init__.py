"""Homomorphic encryption of sums (design: docs/adr/0014-homomorphic-encryption.md)."""
