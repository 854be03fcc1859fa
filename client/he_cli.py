"""A device's command for its key of homomorphic encryption. What is heavy loads inside of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def he_key_command(
    public: Annotated[Path, typer.Argument(metavar="PUBLIC", help="he.public, from the key holder.")],
    keys: Annotated[Path, typer.Argument(metavar="KEYS", help="he.keys, or the part for this device.")],
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="The device's folder, from its enrolment.")],
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the device's keys.")
    ] = None,
) -> None:
    """Install a key of homomorphic encryption from files."""
    from propolis.client.he_key import install_he_key
    from propolis.client.keyholder import Keyholder
    from propolis.client.seal import Seal
    from propolis.he_files import read_published, read_sealed_key
    from propolis.link.keys import passphrase_of

    passphrase = passphrase_of(passphrase_file)
    device = Keyholder.load(folder, passphrase)
    seal = None if passphrase is None else Seal(passphrase)
    sealed = read_sealed_key(keys, device.index)
    opened = install_he_key(folder, device, read_published(public), sealed, time.time(), seal)
    parameters = opened.public.parameters
    typer.echo(
        f"installed: key {opened.number}, for sums of {parameters.clients} devices at most and values of "
        f"{parameters.value_bits} bits, and for {opened.public.use}"
    )
