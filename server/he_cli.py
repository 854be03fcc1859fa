"""The commands for keys of homomorphic encryption: of the root, and of the key holder. What is heavy loads inside."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

DAY_S = 24 * 3600

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder.")]
RootPassphraseFlag = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the root's key.")
]


def he_holder_command(
    folder: FolderArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File for the key; FILE.delegation beside it.")],
    valid_days: Annotated[
        int, typer.Option("--valid-days", help="Days that its keys are believed.", min=1, max=3650)
    ] = 365,
    passphrase_file: RootPassphraseFlag = None,
    key_passphrase_file: Annotated[
        Path | None, typer.Option("--key-passphrase-file", help="File with a passphrase to encrypt the new key under.")
    ] = None,
) -> None:
    """Let a key holder make keys of homomorphic encryption.

    On a machine that is never the server: who has both opens every upload.
    """
    from propolis.link.keys import passphrase_of
    from propolis.server.federation import Federation
    from propolis.server.he_holder import make_holder_key

    key_passphrase = passphrase_of(key_passphrase_file) if key_passphrase_file else None
    federation = Federation(folder, passphrase_of(passphrase_file))
    made = make_holder_key(federation, out, valid_days * DAY_S, time.time(), key_passphrase)
    typer.echo(f"key holder {made.claimed.serial} is in {out}, what the root says of it in {out}.delegation")
    typer.echo(f"on its machine: propolis federation he-key --federation SERVER-FOLDER --holder {out.name} --out DIR")


def revoke_he_holder_command(
    folder: FolderArgument,
    serial: Annotated[int, typer.Argument(metavar="SERIAL", help="The holder's number.")],
    passphrase_file: RootPassphraseFlag = None,
) -> None:
    """Let devices refuse all keys that a holder made."""
    from propolis.link.keys import passphrase_of
    from propolis.server.federation import Federation

    federation = Federation(folder, passphrase_of(passphrase_file))
    if federation.revoke_key_holder(serial):
        typer.echo(f"key holder {serial} is revoked; devices that see the new roster use its keys no more")
        if not federation.root_online:
            typer.echo(f"copy {federation.server / 'roster.bin'} to the server, which notices by itself")
    else:
        typer.echo(f"key holder {serial} was revoked before")


def he_key_command(
    federation: Annotated[
        Path,
        typer.Option("--federation", metavar="DIR", help="A copy of the server's folder: roster and enrolled devices."),
    ],
    holder: Annotated[
        Path,
        typer.Option("--holder", metavar="FILE", help="From he-holder; FILE.secret beside it."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for he.public and he.keys.")],
    clients: Annotated[
        int | None, typer.Option("--clients", help="Most devices of a sum; at first 1000.", min=1, max=2**16)
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="Bits of a value; at first 16.", min=1, max=32)] = None,
    seeded: Annotated[
        bool | None,
        typer.Option("--seeded/--public", help="Encrypt under the secret key, to half of the bytes; at first not."),
    ] = None,
    masks: Annotated[
        bool | None,
        typer.Option(
            "--masks/--no-masks",
            help="Devices encrypt under masks only, whatever a server asks; at first not.",
        ),
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make a new key for all devices, as after a revocation.")
    ] = False,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the holder's key.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Make a key of homomorphic encryption, or seal the last one for devices that came later.

    Where the key holder is. It is sealed to each device that has enrolled; the server gets nothing secret.
    """
    from propolis.link.keys import passphrase_of
    from propolis.server.he_holder import load_holder_key
    from propolis.server.he_key import KEYS_FILE, PUBLIC_FILE, Asked, issue_key

    key = load_holder_key(holder, passphrase_of(passphrase_file))
    issued = issue_key(federation, holder, key, out, Asked(clients, bits, seeded, masks, renew), time.time())
    if as_json:
        told = {
            "number": issued.number,
            "key_id": issued.key.key_id.hex(),
            "masked": issued.key.masked,
            "new": issued.is_new,
            "sealed": list(issued.sealed),
            "devices": issued.devices,
        }
        typer.echo(json.dumps(told))
        return
    made = f"new key {issued.number}" if issued.is_new else f"key {issued.number}"
    typer.echo(
        f"{made}: sealed for {len(issued.sealed)} devices now, {issued.devices} have it; it is for {issued.key.use}"
    )
    typer.echo(f"copy {out / PUBLIC_FILE} and {out / KEYS_FILE} to the server; nothing in them is secret")
