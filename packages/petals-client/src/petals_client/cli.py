"""The command ``petals-client``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from petals_core.errors import ConfigurationError, PetalsError
from petals_core.terminal import HELP_WIDTH, describe_version, parse_connectable_addresses, run_app, stderr_console

if TYPE_CHECKING:
    from petals_client.client import Client
    from petals_client.options import ClientOptions
    from petals_client.routing.explanation import Route

_TIMES: Final = frozenset({"software", "compute", "penalty", "chance"})

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": HELP_WIDTH},
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder of a checkpoint, or its name on the Hugging Face hub.", show_default=False
    ),
]
InitialPeers = Annotated[
    list[str],
    typer.Option(
        "--initial-peers",
        metavar="HOST:PORT",
        help="A peer of the swarm, by which it is found; may be repeated.",
        show_default=False,
    ),
]
IdentityFile = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        metavar="FILE",
        help="Key of a server of yours, whose work for others then counts for you.",
        show_default=False,
    ),
]
SwarmKeyFile = Annotated[
    Path | None, typer.Option("--swarm-key-file", metavar="FILE", help="Key of a private swarm.", show_default=False)
]
TorchDtype = Annotated[
    str,
    typer.Option(
        "--torch-dtype",
        metavar="DTYPE",
        help="What this client computes in: auto (as stored), float32, bfloat16 or float16.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REVISION", help="Branch, tag or commit on the hub.", show_default=False),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="How many tokens to generate at most.")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="NUMBER",
        help="Above 0 to sample; by default the likeliest token is taken.",
        show_default=False,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="SHARE",
        help="Sample from the likeliest tokens, which together have this share, for example 0.9.",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Make sampling repeatable.", show_default=False)]
AllowedServers = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-servers", help="Peer id of a server that may be used; may be repeated [any].", metavar="ID"
    ),
]
BlockedServers = Annotated[
    list[str] | None,
    typer.Option("--blocked-servers", help="Peer id of a server never to use; may be repeated.", metavar="ID"),
]
Speculation = Annotated[
    str,
    typer.Option(
        "--speculation",
        metavar="SOURCE",
        help="Where drafts of several tokens come from, which servers check in one trip: lookup (the text itself), "
        "draft (--draft-model), auto or off.",
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model",
        metavar="MODEL",
        help="A small model with the same tokenizer, which drafts on this machine.",
        show_default=False,
    ),
]
ActiveAdapter = Annotated[
    str | None,
    typer.Option(
        "--active-adapter",
        metavar="NAME",
        help="A LoRA adapter that servers have loaded, by its name.",
        show_default=False,
    ),
]
Compression = Annotated[
    str,
    typer.Option(
        "--compression", metavar="WHEN", help="Of what is sent: auto (where it arrives earlier), none or zstd."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what happens, and tracebacks.")]


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(describe_version("petals-client"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Use a language model that a swarm of servers runs."""


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.", show_default=False)],
    initial_peers: InitialPeers,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    speculation: Speculation = "auto",
    draft_model: DraftModel = None,
    active_adapter: ActiveAdapter = None,
    compression: Compression = "auto",
    torch_dtype: TorchDtype = "auto",
    revision: Revision = None,
    swarm_key_file: SwarmKeyFile = None,
    identity: IdentityFile = None,
    allowed_servers: AllowedServers = None,
    blocked_servers: BlockedServers = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show at the end where the time went.")] = False,
    verbose: Verbose = False,
) -> None:
    """Continue a text and print it as it comes."""
    options = _options(initial_peers, swarm_key_file, allowed_servers, blocked_servers, compression, identity)
    client = _connect(model, options, torch_dtype, revision, verbose, active_adapter)
    with client:
        from petals_client.client import generation_settings, seeded
        from petals_client.text import PieceStreamer
        from petals_client.trace import format_trace

        settings = generation_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        settings |= {"speculation": speculation, "draft_model": draft_model}
        inputs = client.encode(prompt)
        max_length = inputs["input_ids"].shape[1] + max_new_tokens
        with client.model.inference_session(max_length=max_length) as session, seeded(seed):
            client.model.generate(**inputs, **settings, streamer=PieceStreamer(client.tokenizer, _write))
            print()
            if trace:
                stderr_console().print(format_trace(session.trace()))


@app.command()
def chat(
    model: Model,
    initial_peers: InitialPeers,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    max_length: Annotated[
        int, typer.Option("--max-length", metavar="N", help="Tokens that a conversation may have.")
    ] = 4096,
    speculation: Speculation = "auto",
    draft_model: DraftModel = None,
    active_adapter: ActiveAdapter = None,
    compression: Compression = "auto",
    torch_dtype: TorchDtype = "auto",
    revision: Revision = None,
    swarm_key_file: SwarmKeyFile = None,
    identity: IdentityFile = None,
    allowed_servers: AllowedServers = None,
    blocked_servers: BlockedServers = None,
    verbose: Verbose = False,
) -> None:
    """Hold a conversation.

    The servers keep what was said, so that only new tokens travel.
    """
    from petals_client.client import generation_settings

    settings = generation_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    settings |= {"speculation": speculation, "draft_model": draft_model}
    options = _options(initial_peers, swarm_key_file, allowed_servers, blocked_servers, compression, identity)
    console = stderr_console()
    console.print(f"Looking for servers of {model} ...", markup=False)
    client = _connect(model, options, torch_dtype, revision, verbose, active_adapter)
    with client:
        from petals_client.client import seeded
        from petals_client.conversation import Conversation

        blocks = client.model.remote_blocks
        chain = blocks.chain.explain_route(blocks.start, blocks.end).chain
        servers = "1 server holds" if len(chain) == 1 else f"{len(chain)} servers hold"
        console.print(f"{servers} its {len(blocks)} blocks.")
        with seeded(seed), Conversation(client, max_length=max_length, settings=settings) as conversation:
            console.print("Write something; an empty line or Ctrl-D ends the conversation.")
            while line := _read_line():
                try:
                    conversation.reply(line, _write)
                except PetalsError as error:
                    print()
                    console.print(f"error: {error.message}", style="red", soft_wrap=True)
                except KeyboardInterrupt:
                    pass  # of the reply, not of the conversation
                print()


@app.command()
def status(
    model: Model,
    initial_peers: InitialPeers,
    revision: Revision = None,
    swarm_key_file: SwarmKeyFile = None,
    allowed_servers: AllowedServers = None,
    blocked_servers: BlockedServers = None,
    verbose: Verbose = False,
) -> None:
    """Show a model's live servers, and the chain a client would use."""
    options = _options(initial_peers, swarm_key_file, allowed_servers, blocked_servers)
    _set_up_logging(verbose)
    from petals_client.status import read_status
    from petals_client.swarm_chain import SwarmChain
    from petals_core.models.checkpoint import Checkpoint

    chain = SwarmChain.connect(Checkpoint.open(model, revision=revision), options)
    try:
        print(chain.run(read_status))
    finally:
        chain.close()


@app.command()
def route(
    model: Model,
    initial_peers: InitialPeers,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    revision: Revision = None,
    swarm_key_file: SwarmKeyFile = None,
    allowed_servers: AllowedServers = None,
    blocked_servers: BlockedServers = None,
    verbose: Verbose = False,
) -> None:
    """Show a session's chain, what it costs, and why others lost."""
    options = _options(initial_peers, swarm_key_file, allowed_servers, blocked_servers)
    _set_up_logging(verbose)
    from petals_client.swarm_chain import SwarmChain
    from petals_core.models.checkpoint import Checkpoint

    chain = SwarmChain.connect(Checkpoint.open(model, revision=revision), options)
    try:
        found = chain.explain_route(0, chain.num_blocks)
    finally:
        chain.close()
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print_route(found)


def main() -> None:
    """Run the command line."""
    run_app(app)


def _options(
    initial_peers: list[str],
    swarm_key_file: Path | None,
    allowed_servers: list[str] | None,
    blocked_servers: list[str] | None,
    compression: str = "auto",
    identity: Path | None = None,
) -> ClientOptions:
    """Check what can be checked before anything heavy is imported."""
    from petals_client.options import ClientOptions

    return ClientOptions.make(
        initial_peers=parse_connectable_addresses(initial_peers, option="--initial-peers"),
        swarm_key_file=swarm_key_file,
        identity=identity,
        allowed_servers=tuple(allowed_servers) if allowed_servers else None,
        blocked_servers=tuple(blocked_servers or ()),
        compression=compression,
    )


def _connect(
    model: str,
    options: ClientOptions,
    torch_dtype: str,
    revision: str | None,
    verbose: bool,
    active_adapter: str | None,
) -> Client:
    if torch_dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise ConfigurationError(f"--torch-dtype {torch_dtype}: choose auto, float32, float16 or bfloat16")
    _set_up_logging(verbose)
    from petals_client.client import connect

    return connect(
        model,
        initial_peers=options.initial_peers,
        dtype=None if torch_dtype == "auto" else torch_dtype,
        revision=revision,
        options=options,
        active_adapter=active_adapter,
    )


def _print_route(route: Route) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from petals_client.routing.explanation import ALTERNATIVE_COLUMNS, EDGE_COLUMNS

    # Piped into a file a table keeps the width that it needs.
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 240
    tables = [(EDGE_COLUMNS, route.edge_rows()), (ALTERNATIVE_COLUMNS, route.alternative_rows())]
    console.print(f"{route.model_name}, blocks {route.start}:{route.end}: {1000 * route.total_s:.2f} ms a token")
    for columns, rows in tables:
        if not rows:
            continue
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in columns:
            table.add_column(column, justify="right" if "ms" in column or column in _TIMES else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def _set_up_logging(verbose: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("petals_client").setLevel(logging.INFO if verbose else logging.WARNING)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""
