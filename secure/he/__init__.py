"""Homomorphic encryption of sums (design: docs/adr/0013-homomorphic-encryption.md)."""
