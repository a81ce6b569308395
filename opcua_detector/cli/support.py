"""The commands `support-bundle`, `backup` and `restore`: what leaves the machine as one file, and what comes back."""

from __future__ import annotations

import asyncio
import sys
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import config as configuration
from ..config import Config
from ..support import back_up, collect
from ..support import restore as put_back
from .doctor import SECONDS, examine
from .terminal import AsJson, ConfigFile, err, print_json, show, table

Force = Annotated[bool, typer.Option("--force", help="Replace a file of this name.")]


def support_bundle(
    config_file: ConfigFile,
    to: Annotated[Path | None, typer.Option("--out", metavar="FILE", show_default="support-<time>.zip", help=(
        "Zip file to write."))] = None,
    with_doctor: Annotated[bool, typer.Option("--with-doctor", help=(
        "Run `doctor` first and put in what it finds; takes some seconds."))] = False,
    redact_hosts: Annotated[bool, typer.Option("--redact-hosts", help=(
        "Hash the hosts of endpoints and this machine's name too."))] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Say what would be in it, and write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before it is written.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Collect what support needs: redacted configuration, versions, log, statistics, facts of the models.

    Passwords are never in it, user names are hashed; rows, scores and comments neither. What it holds is listed before
    it is written.
    """
    config = configuration.load(config_file)
    found = _doctor(config) if with_doctor else None
    bundle = collect(config, config_file, redact_hosts=redact_hosts, doctor=found)
    parts = [{"name": name, "bytes": len(text.encode()), "what": words} for name, (words, text) in bundle.parts.items()]
    if not as_json:
        show(table("", ["part", "bytes", "what it is"], [[one["name"], one["bytes"], one["what"]] for one in parts]))
    for note in bundle.notes:
        err.print(f"note: {note}", style="yellow", markup=False)
    target = None
    if not list_only:
        target = to or Path(f"support-{_stamp()}.zip")
        if sys.stdin.isatty() and err.is_terminal and not yes:
            typer.confirm(f"Write {target}?", abort=True, err=True)
        bundle.write(target, force=force)
        err.print(f"written: {target}", markup=False)
    if as_json:
        print_json({"file": target, "parts": parts, "notes": list(bundle.notes)})


def _doctor(config: Config) -> dict[str, Any]:
    with err.status("examining") if err.is_terminal else nullcontext():
        diagnoses, facts = asyncio.run(examine(config, list(config.groups), SECONDS, write=False))
    return {"diagnoses": [asdict(one) for one in diagnoses], **facts}


def backup(
    config_file: ConfigFile,
    to: Annotated[Path | None, typer.Option("--out", metavar="FILE", show_default="backup-<time>.zip", help=(
        "Zip file to write."))] = None,
    with_keys: Annotated[bool, typer.Option("--with-keys", help=(
        "With this client's certificate, its private key and the trust list: the file is a secret then."))] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Back up configuration, models and store in one zip with a manifest; the service may run meanwhile."""
    target = to or Path(f"backup-{_stamp()}.zip")
    with err.status("backing up") if err.is_terminal else nullcontext() as shown:
        made = back_up(config_file, target, keys=with_keys, force=force,
                       progress=lambda name: shown.update(f"backing up {name}") if shown is not None else None)
    for text in made.left_out:
        err.print(f"left out: {text}", style="yellow", markup=False)
    err.print(f"written: {target}, {len(made.files)} files", markup=False)
    listed = [{"name": name, "role": role, "bytes": size} for name, (role, size) in made.files.items()]
    if as_json:
        print_json({"file": target, "files": listed, "left_out": list(made.left_out)})
    else:
        show(table("", ["file", "role", "bytes"], [[one["name"], one["role"], one["bytes"]] for one in listed]))


def restore(
    archive: Annotated[Path, typer.Argument(metavar="BACKUP", help="Zip file that `backup` has written.")],
    folder: Annotated[Path, typer.Option("--to", metavar="FOLDER", help=(
        "Folder of the configuration; the rest goes where the configuration says."))],
    force: Annotated[bool, typer.Option("--force", help=(
        "Rename what stands there already (nothing is deleted)."))] = False,
    outside: Annotated[bool, typer.Option("--outside", help=(
        "Allow places outside of the folder, where the configuration names absolute paths."))] = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup back. It is unpacked and checked as a whole first; a damaged one changes nothing."""
    with err.status("restoring") if err.is_terminal else nullcontext() as shown:
        done = put_back(archive, folder, force=force, outside=outside,
                        progress=lambda text: shown.update(text) if shown is not None else None)
    for note in done.notes:
        err.print(f"note: {note}", style="yellow", markup=False)
    for old, new in done.set_aside.items():
        err.print(f"renamed: {old} -> {new.name}", markup=False)
    if as_json:
        print_json({"placed": dict(done.placed), "set_aside": dict(done.set_aside), "notes": list(done.notes)})
    else:
        show(table("", ["file", "put to"], [[name, path] for name, path in done.placed.items()]))


def _stamp() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
