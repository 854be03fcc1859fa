"""The commands of a device. What is heavy loads inside of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from propolis.secure.errors import UsageError

client_app = typer.Typer(help="A device of a federation.", no_args_is_help=True)

_LONGEST_TOKEN = 8192


@client_app.callback()
def client() -> None:
    """A device of a federation."""


@client_app.command("enroll")
def enroll_command(
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="The server's port for enrolment.")],
    token: Annotated[
        str, typer.Option("--token", help="The token; - reads it from standard input, @FILE from a file.")
    ],
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="The device's folder.")],
    require_offline_root: Annotated[
        bool, typer.Option("--require-offline-root", help="Refuse a federation whose server has the root's key.")
    ] = False,
    passphrase_file: Annotated[
        Path | None,
        typer.Option("--passphrase-file", help="File with a passphrase to encrypt the device's keys under."),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the server.", min=1, max=3600)] = 30,
) -> None:
    """Join a federation with a one-time token. If it is interrupted, run it again."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its log would stand beside our one line
    from propolis.client.enroll import Enrolling, enroll
    from propolis.link.address import Address
    from propolis.link.keys import passphrase_of
    from propolis.link.token import Token

    asked = Enrolling(
        Address.parse(server),
        Token.from_text(_read_token(token)),
        folder,
        passphrase_of(passphrase_file),
        timeout,
        require_offline_root,
    )
    invitation = enroll(asked)
    typer.echo(f"this is device {invitation.index}, {invitation.name}; its keys are in {folder}")
    if invitation.root_online:
        print("this federation keeps its root key on the server: who controls it can invite devices", file=sys.stderr)


def _read_token(given: str) -> str:
    try:
        if given == "-":
            return sys.stdin.read(_LONGEST_TOKEN)
        if given.startswith("@"):
            with Path(given[1:]).open(encoding="utf-8", errors="replace") as file:
                return file.read(_LONGEST_TOKEN)
    except OSError as error:
        raise UsageError(f"cannot read the token from {given[1:]}: {error.strerror}") from None
    return given
