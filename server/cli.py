"""The commands of the federation's root. What is heavy loads inside of them."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from propolis.server.he_cli import he_holder_command, he_key_command, revoke_he_holder_command

if TYPE_CHECKING:
    from propolis.server.federation import Federation

federation_app = typer.Typer(help="Who belongs to a federation: its root, its devices.", no_args_is_help=True)
federation_app.command("he-holder")(he_holder_command)
federation_app.command("revoke-he-holder")(revoke_he_holder_command)
federation_app.command("he-key")(he_key_command)

HOUR_S, DAY_S = 3600, 24 * 3600

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The device's name.")]
PassphraseFlag = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the root's key.")
]
ServerPassphraseFlag = Annotated[
    Path | None, typer.Option("--server-passphrase-file", help="File with the passphrase of the server's keys.")
]
DaysFlag = Annotated[int, typer.Option("--valid-days", help="Days that it is valid.", min=1, max=3650)]


@federation_app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    name: Annotated[
        str, typer.Option("--name", metavar="HOST,...", help="The server's DNS names and IP addresses.")
    ] = "localhost,127.0.0.1",
    root_online: Annotated[
        bool, typer.Option("--root-online", help="Keep the root's key on the server; devices are told.")
    ] = False,
    valid_days: DaysFlag = 365,
    passphrase_file: PassphraseFlag = None,
    server_passphrase_file: ServerPassphraseFlag = None,
) -> None:
    """Make a new federation.

    Its root's key, its roster, and the folder `server` with all that its server needs.
    """
    from propolis.link.keys import passphrase_of
    from propolis.server.foundation import Foundation, found

    server_passphrase = passphrase_of(server_passphrase_file) if server_passphrase_file else None
    foundation = Foundation(_split(name), root_online, valid_days, passphrase_of(passphrase_file), server_passphrase)
    found(folder, foundation, time.time())
    if root_online:
        typer.echo(f"the federation is in {folder}, and the root's key on the server, in {folder / 'server'}")
    else:
        typer.echo(
            f"the federation is in {folder}: keep {folder / 'root.key'} off the server, copy {folder / 'server'} to it"
        )
    typer.echo(f"invite a device: propolis federation invite {folder} NAME")


@federation_app.command("invite")
def invite(
    folder: FolderArgument,
    name: NameArgument,
    expires_hours: Annotated[
        int, typer.Option("--expires-hours", help="Hours that the token may be used.", min=1, max=24 * 3650)
    ] = 72,
    replace: Annotated[
        bool, typer.Option("--replace", help="Revoke the device that has this name, and invite another one.")
    ] = False,
    passphrase_file: PassphraseFlag = None,
) -> None:
    """Print the one-time token of a device.

    For as long as it is valid, the same one again.
    """
    from propolis.link.keys import passphrase_of
    from propolis.server.federation import Federation

    federation = Federation(folder, passphrase_of(passphrase_file))
    typer.echo(federation.invite(name, expires_hours * HOUR_S, time.time(), replace))
    print(
        f"on the device: propolis client enroll --server HOST:PORT --token - --dir DIR\n{_to_do(federation)}",
        file=sys.stderr,
    )


@federation_app.command("list")
def list_members(
    folder: FolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """List the devices.

    As far as this folder knows: the server's knows who has enrolled.
    """
    from propolis.server.federation import Federation

    members = Federation(folder).members(time.time())
    if as_json:
        typer.echo(json.dumps([asdict(member) for member in members]))
        return
    width = max((len(member.name) for member in members), default=4)
    typer.echo(f"index  {'name':<{width}}  state     node id")
    for member in members:
        node_id = "" if member.node_id is None else str(member.node_id)
        typer.echo(f"{member.index:>5}  {member.name:<{width}}  {member.state:<8}  {node_id}".rstrip())


@federation_app.command("revoke")
def revoke(folder: FolderArgument, name: NameArgument, passphrase_file: PassphraseFlag = None) -> None:
    """Take a device out, for good."""
    from propolis.link.keys import passphrase_of
    from propolis.server.federation import Federation

    federation = Federation(folder, passphrase_of(passphrase_file))
    if federation.revoke(name):
        typer.echo(f"{name} is revoked; {_to_do(federation)}")
    else:
        typer.echo(f"{name} was revoked before")


@federation_app.command("renew")
def renew(
    folder: FolderArgument,
    valid_days: DaysFlag = 365,
    server_cert: Annotated[
        bool, typer.Option("--server-cert", help="The server's certificate, in place of the roster.")
    ] = False,
    name: Annotated[
        str, typer.Option("--name", metavar="HOST,...", help="With --server-cert: other names than before.")
    ] = "",
    passphrase_file: PassphraseFlag = None,
    server_passphrase_file: ServerPassphraseFlag = None,
) -> None:
    """Make the roster last longer.

    With --server-cert, the server's certificate instead.
    """
    from propolis.link.keys import passphrase_of
    from propolis.secure.errors import UsageError
    from propolis.server.federation import Federation
    from propolis.server.foundation import renew_server_certificate

    if name and not server_cert:
        raise UsageError("--name is of the server's certificate: give --server-cert too")
    if server_cert:
        federation = Federation(folder)
        server_passphrase = passphrase_of(server_passphrase_file) if server_passphrase_file else None
        renew_server_certificate(federation.server, _split(name), valid_days, server_passphrase, time.time())
        typer.echo(f"copy {federation.server / 'tls.pem'} to the server, and start it again")
        return
    federation = Federation(folder, passphrase_of(passphrase_file))
    federation.renew_roster(time.time() + valid_days * DAY_S)
    typer.echo(_to_do(federation))


@federation_app.command("release-key")
def release_key(
    folder: FolderArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File for the key; FILE.delegation beside it.")],
    valid_days: DaysFlag = 90,
    models: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME", help="Only for this model; may be repeated.")
    ] = None,
    passphrase_file: PassphraseFlag = None,
    key_passphrase_file: Annotated[
        Path | None, typer.Option("--key-passphrase-file", help="File with a passphrase to encrypt the new key under.")
    ] = None,
) -> None:
    """Make a key that may release models.

    It signs packages for the devices, wherever it is kept.
    """
    from propolis.link.keys import passphrase_of
    from propolis.server.federation import Federation
    from propolis.server.release_key import make_release_key

    key_passphrase = passphrase_of(key_passphrase_file) if key_passphrase_file else None
    federation = Federation(folder, passphrase_of(passphrase_file))
    made = make_release_key(federation, out, valid_days * DAY_S, time.time(), tuple(models or ()), key_passphrase)
    typer.echo(f"release key {made.claimed.serial} is in {out}, what the root says of it in {out}.delegation")


@federation_app.command("revoke-release-key")
def revoke_release_key(
    folder: FolderArgument,
    serial: Annotated[int, typer.Argument(metavar="SERIAL", help="The key's number.")],
    passphrase_file: PassphraseFlag = None,
) -> None:
    """Let devices refuse all that a release key signed, also what they have installed."""
    from propolis.link.keys import passphrase_of
    from propolis.server.federation import Federation

    federation = Federation(folder, passphrase_of(passphrase_file))
    if federation.revoke_release_key(serial):
        typer.echo(f"release key {serial} is revoked; {_to_do(federation)}")
    else:
        typer.echo(f"release key {serial} was revoked before")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _to_do(federation: Federation) -> str:
    """What is left to do after a change of the roster."""
    if federation.root_online:
        return "the server notices by itself"
    return f"copy {federation.server / 'roster.bin'} to the server, which notices by itself"
