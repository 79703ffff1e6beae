"""The ``petals-dht`` program."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError, MissingBlocksError, PetalsError
from petals_core.swarm_key import SwarmKey
from petals_core.terminal import HELP_WIDTH, describe_version, parse_connectable_addresses, run_app, stderr_console

if TYPE_CHECKING:
    from petals_dht.overview import ModelOverview

DEFAULT_PORT = 31330
_WIDE_COLUMNS = 100
"""Of a terminal that has room for everything."""
app = typer.Typer(
    name="petals-dht",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": HELP_WIDTH},
)

InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        metavar="HOST:PORT",
        help="A node of the swarm to join by. Give it several times, or several separated by commas: one that answers "
        "is enough.",
    ),
]
SwarmKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--swarm-key-file",
        metavar="FILE",
        help="The secret of a private swarm ('petals-dht keygen' makes one). All its members need the same.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show tracebacks of errors.")]


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(describe_version("petals-dht"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Start and watch the directory of a Petals swarm: who serves which blocks of which model."""


@app.command()
def bootstrap(
    host: Annotated[
        str | None, typer.Option("--host", metavar="HOST", help="Address to listen on [all of this machine's].")
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="UDP port; 0 takes any.")
    ] = DEFAULT_PORT,
    announce_host: Annotated[
        str | None,
        typer.Option(
            "--announce-host",
            metavar="HOST",
            help="The name or address by which others reach this machine, if it has another.",
        ),
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option(
            "--identity",
            metavar="FILE",
            help="This node's private key; made if there is none [one kept for this user].",
        ),
    ] = None,
    swarm_key_file: SwarmKeyFile = None,
    initial_peers: InitialPeers = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="FILE",
            help="Where the node writes down whom it knows [a file kept for this user and port].",
        ),
    ] = None,
    max_requests_per_s: Annotated[
        int,
        typer.Option(
            "--max-requests-per-s",
            min=10,
            max=1_000_000,
            metavar="N",
            help="Requests answered each second, of all together.",
        ),
    ] = 5000,
    max_requests_per_source_per_s: Annotated[
        int,
        typer.Option(
            "--max-requests-per-source-per-s", min=10, max=1_000_000, metavar="N", help="The same, for each address."
        ),
    ] = 200,
    status: Annotated[
        bool, typer.Option("--status", help="Tell how the node is that was started with these options.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --status: print JSON for programs.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a node that others join a swarm by, until Ctrl-C.

    It prints one line with the address to give to the others. Swarms with several such nodes survive the loss of one:
    start the second with --initial-peers of the first. UDP has to reach the port through firewalls and NAT. The node
    keeps its identity and the nodes that it knows, so it finds its swarm again after a restart.
    """
    from petals_core.identity import Identity, data_folder
    from petals_core.net.loop import run
    from petals_dht.bootstrap import run_bootstrap
    from petals_dht.rates import Rate
    from petals_dht.responder import NodeLimits

    if announce_host is not None:
        Address(announce_host, port or DEFAULT_PORT)
    swarm_key = _read_key(swarm_key_file)
    state = state or data_folder() / f"bootstrap-{port}.json"
    if status:
        _print_status(state, swarm_key, as_json=as_json)
        return
    if as_json:
        raise ConfigurationError("--json goes with --status: a node that runs prints one line")
    peers = parse_connectable_addresses(initial_peers or (), option="--initial-peers")
    own = Identity.load(identity) if identity is not None else Identity.default("bootstrap")

    def tell(address: Address, num_known: int) -> None:
        typer.echo(f"Ready. Others join with --initial-peers {address}")
        if num_known:
            stderr_console().print(f"{num_known} nodes of the swarm are known.")

    try:
        run(
            run_bootstrap(
                own,
                host,
                port,
                announce_host=announce_host,
                swarm_key=swarm_key,
                initial_peers=peers,
                state_file=state,
                limits=NodeLimits(
                    request_rate=Rate(per_s=max_requests_per_source_per_s, burst=10 * max_requests_per_source_per_s),
                    total_request_rate=Rate(per_s=max_requests_per_s, burst=4 * max_requests_per_s),
                ),
                on_ready=tell,
            )
        )
    except KeyboardInterrupt:
        return
    finally:
        own.release()


def _print_status(state: Path, swarm_key: SwarmKey | None, *, as_json: bool) -> None:
    import time

    from petals_core.net.loop import run
    from petals_dht.bootstrap import ask_status, describe_status

    record, round_trip_s = run(ask_status(state, swarm_key))
    if as_json:
        typer.echo(json.dumps(record.to_json(round_trip_s=round_trip_s), indent=2))
        return
    for line in describe_status(record, round_trip_s, now_s=time.time()):
        typer.echo(line)


@app.command()
def show(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Only models of this name, or part of a name.")
    ] = None,
    initial_peers: InitialPeers = None,
    swarm_key_file: SwarmKeyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, max=600, metavar="SECONDS", help="How long to wait for the swarm.")
    ] = 10.0,
    verbose: Verbose = False,
) -> None:
    """Show a swarm's models, their servers, and blocks nobody serves.

    The strip has one character per block: how many servers hold it, or · for a block that is missing.
    """
    from petals_core.net.loop import run

    peers = parse_connectable_addresses(initial_peers or (), option="--initial-peers")
    overviews, clock_offset_s = run(_look(peers, _read_key(swarm_key_file), model, timeout))
    if as_json:
        typer.echo(json.dumps({"models": [overview.to_json() for overview in overviews]}, indent=2))
    if not overviews:
        raise _nothing_found(model, clock_offset_s)
    if not as_json:
        _print(overviews)


@app.command()
def monitor(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Only models of this name, or part of a name.")
    ] = None,
    initial_peers: InitialPeers = None,
    swarm_key_file: SwarmKeyFile = None,
    once: Annotated[bool, typer.Option("--once", help="Print the view once; so too where stdout is a pipe.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs, once.")] = False,
    as_prometheus: Annotated[
        bool, typer.Option("--prometheus", help="Print metrics in the text format of Prometheus, once.")
    ] = False,
    refresh: Annotated[
        float, typer.Option("--refresh", min=1, max=3600, metavar="SECONDS", help="How often the swarm is looked up.")
    ] = 5.0,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, max=600, metavar="SECONDS", help="How long to wait for the swarm.")
    ] = 10.0,
    verbose: Verbose = False,
) -> None:
    """Watch a swarm: coverage, servers, warnings, a route through it.

    Every server is connected to, so that those that announce themselves and do not answer are seen. Keys: s sorts, r
    turns the order around, / filters (by name, state, version, adapter or block), arrows select, enter opens one
    server, tab goes to the next model, q quits.
    """
    from petals_core.net.loop import run
    from petals_dht.monitor.program import Output, run_monitor

    chosen = [
        output
        for output, is_wanted in ((Output.ONCE, once), (Output.JSON, as_json), (Output.PROMETHEUS, as_prometheus))
        if is_wanted
    ]
    if len(chosen) > 1:
        raise ConfigurationError("--once, --json and --prometheus exclude each other: give one of them")
    peers = parse_connectable_addresses(initial_peers or (), option="--initial-peers")
    run(
        run_monitor(
            peers,
            _read_key(swarm_key_file),
            model,
            output=chosen[0] if chosen else Output.LIVE,
            refresh_s=refresh,
            timeout_s=timeout,
            explain_nothing=_nothing_found,
        )
    )


@app.command()
def keygen(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it; must not exist yet.")],
    verbose: Verbose = False,
) -> None:
    """Make the secret of a private swarm.

    Only its owner may read the file. Copy it to every member over a safe channel; whoever has it is a member.
    """
    key = SwarmKey.generate()
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigurationError(f"{file} exists already: choose another name, or remove it first") from None
    except OSError as error:
        raise ConfigurationError(f"{file} can't be written: {error.strerror or error}") from error
    with os.fdopen(descriptor, "w") as stream:
        stream.write(key.secret.hex() + "\n")
    stderr_console().print(f"Swarm key written to {file}. Members use it with --swarm-key-file.")


async def _look(
    peers: tuple[Address, ...], swarm_key: SwarmKey | None, wanted: str | None, timeout_s: float
) -> tuple[list[ModelOverview], float | None]:
    """The models, and by how much this machine's clock seems to be wrong where there are none."""
    import asyncio

    from petals_dht.directory import Directory
    from petals_dht.overview import ModelOverview, ModelSummary, choose

    async with await Directory.connect(peers, swarm_key=swarm_key, timeout_s=timeout_s) as directory:

        async def look(model: ModelSummary) -> ModelOverview:
            return ModelOverview.of(model, await directory.find_servers(model.fingerprint, timeout_s=timeout_s))

        models = await directory.list_models(timeout_s=timeout_s)
        overviews = await asyncio.gather(*(look(model) for model in models))
        clock_offset_s = directory.suspected_clock_offset_s()
    return choose([overview for overview in overviews if overview.servers], wanted), clock_offset_s


def _nothing_found(wanted: str | None, clock_offset_s: float | None) -> PetalsError:
    """Why there is nothing to show."""
    if clock_offset_s is not None:
        from petals_dht.overview import clock_text

        return ConfigurationError(clock_text(clock_offset_s))
    if wanted is None:
        return MissingBlocksError("no server is online in this swarm: start one with 'petals-server serve MODEL'")
    return MissingBlocksError(f"no server of this swarm serves a model named {wanted}: leave the name out to see all")


def _print(overviews: list[ModelOverview]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from petals_dht.overview import spans_text, speed_text, strip_of

    console = Console(highlight=False)
    for overview in overviews:
        model, missing = overview.model, overview.missing
        title = Text.assemble(
            (model.model_name, "bold"), f"  {model.num_blocks} blocks, fingerprint {model.fingerprint[:12]}"
        )
        console.print(title)
        console.print(Text(strip_of(overview.coverage)))
        if missing:
            console.print(Text(f"missing: {spans_text(missing)}", style="red"))
        else:
            console.print(Text("complete", style="green"))
        table = Table(box=None, pad_edge=False, header_style="dim")
        headers = ["server", "blocks", "state", "address", "dtype", "tokens/s", "cache", "name"]
        if console.width >= _WIDE_COLUMNS:
            headers.append("version")
        for header in headers:
            # What may be copied, and numbers, stay in one piece.
            is_number = header in ("cache", "tokens/s")
            may_fold = header in ("name", "version")
            table.add_column(header, justify="right" if is_number else "left", overflow="fold", no_wrap=not may_fold)
        for signed in overview.servers:
            entry = signed.announcement
            dtype = entry.torch_dtype if entry.quantization == "none" else entry.quantization
            cells = (
                signed.peer_id.short,
                f"{entry.start}:{entry.end}",
                entry.state,
                ", ".join(str(address) for address in entry.addresses),
                dtype,
                speed_text(entry),
                "" if entry.cache_tokens_left is None else f"{entry.cache_tokens_left:,}",
                entry.public_name,
                entry.version,
            )
            table.add_row(*(Text(cell) for cell in cells[: len(headers)]))
        console.print(table)
        console.print()


def _read_key(path: Path | None) -> SwarmKey | None:
    return None if path is None else SwarmKey.read(path)


def main() -> None:
    """Run the program."""
    run_app(app)
