"""The commands of a device. What is heavy loads inside of them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from propolis.client.config import ClientConfig
from propolis.client.he_cli import he_key_command
from propolis.client.models_cli import install_command, installed_command, serve_command
from propolis.client.open_cli import open_command
from propolis.secure.errors import UsageError

client_app = typer.Typer(help="A device of a federation.", no_args_is_help=True)
client_app.command("he-key")(he_key_command)
client_app.command("open")(open_command)
client_app.command("install")(install_command)
client_app.command("installed")(installed_command)
client_app.command("serve")(serve_command)

_LONGEST_TOKEN = 8192
# The thread that a device's app works in. Python cannot end it: a process that has it leaves without waiting.
APP_THREAD = "propolis-app"


def _flag(name: str) -> Any:
    """The flag of a field of `ClientConfig`."""
    return typer.Option(f"--{name.replace('_', '-')}", help=ClientConfig.model_fields[name].description)


def _switch(name: str) -> Any:
    """The pair of flags of a field of `ClientConfig` that is true or false."""
    flag = name.replace("_", "-")
    return typer.Option(f"--{flag}/--no-{flag}", help=ClientConfig.model_fields[name].description)


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
    """Join a federation with a one-time token.

    If it is interrupted, run it again.
    """
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


@client_app.command("run")
def run_command(
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="The device's folder, from its enrolment.")],
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of the device's owner.")] = None,
    server: Annotated[str | None, _flag("server")] = None,
    task: Annotated[str | None, _flag("task")] = None,
    data: Annotated[str | None, _flag("data")] = None,
    device: Annotated[str | None, _flag("device")] = None,
    threads: Annotated[int | None, _flag("threads")] = None,
    client_flower_app: Annotated[str | None, _flag("app")] = None,
    node_config: Annotated[
        str, typer.Option("--node-config", help="KEY=VALUE pairs of Flower's node configuration; policies are some.")
    ] = "",
    largest_message: Annotated[int | None, _flag("largest_message")] = None,
    install: Annotated[bool | None, _switch("install")] = None,
    largest_model: Annotated[int | None, _flag("largest_model")] = None,
    download_rate: Annotated[int | None, _flag("download_rate")] = None,
    store_plain: Annotated[bool | None, _switch("store_plain")] = None,
    log_format: Annotated[str | None, _flag("log_format")] = None,
    once: Annotated[bool, typer.Option("--once", help="End with the run, in place of waiting for more.")] = False,
    patience: Annotated[
        float, typer.Option("--patience", help="With --once: seconds without a connection to give up after.", min=0)
    ] = 60,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the device's keys.")
    ] = None,
) -> None:
    """Take part: train when asked, and connect again for ever."""
    from propolis.client.config import load_client_config

    flags = {
        "server": server,
        "task": task,
        "data": data,
        "device": device,
        "threads": threads,
        "app": client_flower_app,
        "largest_message": largest_message,
        "install": install,
        "largest_model": largest_model,
        "download_rate": download_rate,
        "store_plain": store_plain,
        "log_format": log_format,
    }
    told = load_client_config(folder, config, flags, node_config)

    from propolis.client.process import Attendance, attend
    from propolis.link.keys import PASSPHRASE_VARIABLE, passphrase_of
    from propolis.logs import configure_logging

    configure_logging(told.log_format)
    passphrase = passphrase_of(passphrase_file)
    if passphrase is not None:  # the mod of an app opens the device's state with it
        os.environb[PASSPHRASE_VARIABLE.encode()] = passphrase
    attend(folder, told, Attendance(once, patience), passphrase)


@client_app.command("fetch")
def fetch_command(
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="The device's folder, from its enrolment.")],
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of the device's owner.")] = None,
    server: Annotated[str | None, _flag("server")] = None,
    largest_model: Annotated[int | None, _flag("largest_model")] = None,
    download_rate: Annotated[int | None, _flag("download_rate")] = None,
    store_plain: Annotated[bool | None, _switch("store_plain")] = None,
    task: Annotated[str | None, _flag("task")] = None,
    data: Annotated[str | None, _flag("data")] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the device's keys.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Ask the server once for models, and install what is new; a device that runs does so by itself."""
    from propolis.client.config import load_client_config

    flags = {
        "server": server,
        "largest_model": largest_model,
        "download_rate": download_rate,
        "store_plain": store_plain,
        "task": task,
        "data": data,
    }
    told = load_client_config(folder, config, flags, "")

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its log would stand beside our one line
    from propolis.client.process import fetch
    from propolis.link.keys import passphrase_of
    from propolis.logs import configure_logging

    configure_logging(told.log_format)
    taken = fetch(folder, told, passphrase_of(passphrase_file))
    if as_json:
        typer.echo(json.dumps([{"name": each.name, "sequence": each.sequence} for each in taken]))
        return
    for each in taken:
        typer.echo(f"installed: release {each.sequence} of {each.name}")
    if not taken:
        typer.echo("there is nothing new for this device")
