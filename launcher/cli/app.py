"""The command line: parse, call, print. Everything heavy is imported inside the commands."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from inventory.errors import FleetError
from launcher.cli.spec_flags import FleetOption, Model, SpecFile, takes_spec

app = typer.Typer(
    name="launcher",
    help="Bring up large language models over several GPU machines, and keep them up.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command()
@takes_spec
def up(
    file: Path | None,
    flags: dict[str, Any],
    preflight: Annotated[
        str | None, typer.Option("--preflight", help="quick (with a collective check) or passive.")
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not wait until it serves.")
    ] = False,
    foreground: Annotated[
        bool,
        typer.Option("--foreground", help="Be the controller: for systemd, or a container."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring a fleet up and print its endpoint. Run again, it joins what runs."""
    from launcher.cli import up as command

    if preflight:
        flags["preflight"] = preflight
    _watched(
        lambda: command.up(file, flags, wait=not no_wait, foreground=foreground, as_json=as_json)
    )


@app.command()
@takes_spec
def plan(
    file: Path | None,
    flags: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Show the layout that up would use, and why. Changes nothing."""
    from launcher.cli import show as command

    raise typer.Exit(command.plan(file, flags, as_json=as_json))


@app.command()
@takes_spec
def render(
    file: Path | None,
    flags: dict[str, Any],
    out: Annotated[Path | None, typer.Option("--out", help="Write the files here.")] = None,
    as_json: Json = False,
) -> None:
    """Write, byte for byte, the scripts and commands that up would run."""
    from launcher.cli import show as command

    raise typer.Exit(command.render(file, flags, out=out, as_json=as_json))


@app.command()
def status(file: SpecFile = None, fleet: FleetOption = None, as_json: Json = False) -> None:
    """Show a fleet: replicas, nodes, phases, and what is being waited for."""
    from launcher.cli import show as command

    raise typer.Exit(command.status(_find(file, fleet), as_json=as_json))


@app.command()
def top(file: SpecFile = None, fleet: FleetOption = None, as_json: Json = False) -> None:
    """Watch a fleet: its replicas with tokens per second and requests, and its last events."""
    from launcher.cli import top as command

    paths = _find(file, fleet)
    _watched(lambda: command.top(paths, as_json=as_json))


@app.command()
def ls(as_json: Json = False) -> None:
    """List all fleets of this user."""
    from launcher.cli import show as command

    raise typer.Exit(command.ls(as_json=as_json))


@app.command()
def logs(
    replica: Annotated[str | None, typer.Argument(help="A replica, such as r1.")] = None,
    file: SpecFile = None,
    fleet: FleetOption = None,
    node: Annotated[str | None, typer.Option(help="Only this node.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as the logs grow.")] = False,
    lines: Annotated[int, typer.Option(help="Lines from the end of each log.")] = 40,
    as_json: Json = False,
) -> None:
    """Show the engines' logs, the first failure first."""
    from launcher.cli import logs as command

    paths = _find(file, fleet)
    _watched(
        lambda: command.logs(
            paths, replica, node=node, follow=follow, lines=lines, as_json=as_json
        )
    )


@app.command()
def events(
    file: SpecFile = None,
    fleet: FleetOption = None,
    limit: Annotated[int, typer.Option(min=1, help="How many of the last ones.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as things happen.")] = False,
    as_json: Json = False,
) -> None:
    """Show what was done to a fleet, and why."""
    from launcher.cli import events as command

    paths = _find(file, fleet)
    _watched(lambda: command.events(paths, limit=limit, follow=follow, as_json=as_json))


@app.command()
def nodes(
    file: SpecFile = None,
    fleet: FleetOption = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """List the nodes that the spec's backend has, and their state."""
    from launcher.cli import show as command

    flags = {key: value for key, value in {"name": fleet, "model": model}.items() if value}
    raise typer.Exit(command.nodes(file, flags, as_json=as_json))


@app.command()
def preflight(
    node: Annotated[
        list[str] | None, typer.Argument(help="Nodes, folded or not; all of the pool otherwise.")
    ] = None,
    file: SpecFile = None,
    fleet: FleetOption = None,
    pool: Annotated[
        str | None, typer.Option("--pool", help="Another partition, or list of the inventory.")
    ] = None,
    level: Annotated[
        str, typer.Option(help="passive (2 s), quick (30 s), fabric (60 s) or deep.")
    ] = "quick",
    explain: Annotated[
        bool, typer.Option("--explain", help="Value, threshold and source of every finding.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option("--record", help="Keep the raw evidence in this folder.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option("--replay", help="Judge a recording instead of live nodes.")
    ] = None,
    thresholds: Annotated[
        Path | None, typer.Option("--thresholds", help="Other limits for --replay (YAML).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check nodes before they take work; exits 3 when one is unfit."""
    from launcher.cli import preflight as command

    flags = {"name": fleet} if fleet else {}
    code = command.run(
        file,
        flags,
        node or [],
        pool=pool,
        level=level,
        explain=explain,
        record_to=record,
        replay_from=replay,
        thresholds=thresholds,
        as_json=as_json,
    )
    raise typer.Exit(code)


@app.command()
def cordon(
    node: Annotated[list[str], typer.Argument(help="Nodes, folded or not.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever reads it later.")],
    file: SpecFile = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="In Slurm, too (needs operator rights).")
    ] = False,
) -> None:
    """Take nodes out of use for new work. What serves there goes on."""
    from launcher.cli import preflight as command

    raise typer.Exit(command.cordon(file, {}, node, reason, drain=drain))


@app.command()
def uncordon(
    node: Annotated[list[str], typer.Argument(help="Nodes, folded or not.")],
    file: SpecFile = None,
    force: Annotated[bool, typer.Option("--force", help="Without a preflight.")] = False,
    as_json: Json = False,
) -> None:
    """Let nodes take work again, once they pass a preflight."""
    from launcher.cli import preflight as command

    raise typer.Exit(command.uncordon(file, {}, node, force=force, as_json=as_json))


@app.command()
def down(file: SpecFile = None, fleet: FleetOption = None, as_json: Json = False) -> None:
    """Stop everything of this fleet and nothing else."""
    from launcher import fleets
    from launcher.cli import up as command
    from launcher.cli.output import say

    if fleet is None and file is None and not fleets.all_fleets():
        say("there is no fleet; nothing to do")
        raise typer.Exit(0)
    _watched(lambda: command.down(_find(file, fleet), as_json=as_json))


@app.command()
def restart(
    replica: Annotated[str, typer.Argument(help="A replica, such as r1.")],
    file: SpecFile = None,
    fleet: FleetOption = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not wait until it serves again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Restart one replica, also one that was given up or waits. Its requests end first."""
    from launcher.cli import restart as command

    paths = _find(file, fleet)
    _watched(lambda: command.restart(paths, replica, wait=not no_wait, as_json=as_json))


@app.command()
def drill(
    kind: Annotated[str, typer.Argument(help="rank, node, hang or disk.")] = "rank",
    file: SpecFile = None,
    fleet: FleetOption = None,
    replica: Annotated[
        str | None, typer.Option("--replica", help="Whom it hits; the first one otherwise.")
    ] = None,
    node: Annotated[
        str | None, typer.Option("--node", help="Where; the replica's last node otherwise.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before.")] = False,
    as_json: Json = False,
) -> None:
    """Inflict a real fault under load; say how long it took and what requests it cost.

    rank: the engine's process on a node is killed. node: its agent and everything there dies at
    once. hang: the engine's processes are stopped. disk: the scratch disk is full for a minute.

    A network link cannot be cut without root, so no drill does.
    """
    from launcher.cli import drill as command

    paths = _find(file, fleet)
    _watched(lambda: command.drill(paths, kind, replica, node, yes=yes, as_json=as_json))


@app.command()
def support(
    file: SpecFile = None,
    fleet: FleetOption = None,
    out: Annotated[Path | None, typer.Option(help="Where the archive goes.")] = None,
    as_json: Json = False,
) -> None:
    """Pack logs, documents, journal and versions into one archive, without any secret."""
    from launcher.cli import support as command

    raise typer.Exit(command.support(_find(file, fleet), out, as_json=as_json))


gateway_app = typer.Typer(help="The fleet's one address: its state, its keys, its restart.")
app.add_typer(gateway_app, name="gateway", no_args_is_help=True)
key_app = typer.Typer(help="Who may ask: keys by name, added and revoked at run time.")
gateway_app.add_typer(key_app, name="key", no_args_is_help=True)
KeyName = Annotated[str, typer.Argument(help="The key's name.")]


@gateway_app.command("status")
def gateway_status(
    file: SpecFile = None, fleet: FleetOption = None, as_json: Json = False
) -> None:
    """Members, requests in flight and waiting, retried, rescued, refused."""
    from launcher.cli import gateway as command

    raise typer.Exit(command.status(_find(file, fleet), as_json=as_json))


@gateway_app.command("restart")
def gateway_restart(file: SpecFile = None, fleet: FleetOption = None) -> None:
    """Restart it as the version that is installed now, without dropping a request."""
    from launcher.cli import gateway as command

    raise typer.Exit(command.restart(_find(file, fleet)))


@key_app.command("add")
def key_add(
    name: KeyName,
    file: SpecFile = None,
    fleet: FleetOption = None,
    waiting: Annotated[
        int | None, typer.Option("--waiting", min=1, help="How many requests may wait at once.")
    ] = None,
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Take the key from the first line of stdin.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a key and print it, this once."""
    from launcher.cli import gateway as command

    paths = _find(file, fleet)
    raise typer.Exit(command.add_key(paths, name, waiting, from_stdin=stdin, as_json=as_json))


@key_app.command("revoke")
def key_revoke(name: KeyName, file: SpecFile = None, fleet: FleetOption = None) -> None:
    """A key counts no more, from the next request on."""
    from launcher.cli import gateway as command

    raise typer.Exit(command.revoke_key(_find(file, fleet), name))


@key_app.command("ls")
def key_ls(file: SpecFile = None, fleet: FleetOption = None, as_json: Json = False) -> None:
    """The keys by name; what is kept of each is its hash."""
    from launcher.cli import gateway as command

    raise typer.Exit(command.list_keys(_find(file, fleet), as_json=as_json))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the spec, for editors."""
    from launcher.cli.output import document
    from launcher.spec import FleetSpec

    document(FleetSpec.model_json_schema())


@app.command()
def bootstrap(
    file: SpecFile = None,
    fleet: FleetOption = None,
    wheels: Annotated[
        Path | None,
        typer.Option(
            "--wheels", help="A folder of wheels, where this machine has no package index."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put the agent onto the nodes of the spec (SSH), or prove that it runs there (Slurm)."""
    from launcher.cli import bootstrap as command

    flags = {"name": fleet} if fleet else {}
    raise typer.Exit(command.bootstrap(file, flags, wheels=wheels, as_json=as_json))


def _watched(command: Callable[[], int]) -> None:
    """Run a command that watches; Ctrl-C ends the watching and nothing else."""
    try:
        code = command()
    except KeyboardInterrupt:
        from launcher.cli.output import say

        say("stopped watching; the fleet goes on (`launcher status`, `launcher down`)")
        code = 130
    raise typer.Exit(code)


def _find(file: Path | None, fleet: str | None) -> Any:
    """The fleet that the user means: by name, by spec, or the only one there is."""
    from launcher import fleets
    from launcher.specfile import DEFAULT_FILE, load

    name = None
    if fleet is None and (file is not None or Path(DEFAULT_FILE).is_file()):
        name = load(file, {}).spec.name
    return fleets.find(fleet, name)


def main() -> None:
    """The entry point: expected errors become one paragraph and their exit code."""
    try:
        app()
    except FleetError as error:
        from launcher.cli import output

        output.complain(error)
        if "--json" in sys.argv:
            output.document(
                {
                    "version": 1,
                    "fleet": None,
                    "endpoint": None,
                    "api_key_file": None,
                    "replicas": [],
                    "spares": [],
                    "waiting_for": [],
                    "error": output.error_of(error),
                }
            )
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the last net: a traceback is not for users
        from launcher.cli import output

        output.say(f"launcher: this is a bug in launcher: {type(error).__name__}: {error}")
        output.say(f"  Please report it with {output.write_crash()}")
        sys.exit(1)


if __name__ == "__main__":
    main()
