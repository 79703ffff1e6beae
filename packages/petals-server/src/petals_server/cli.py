"""The ``petals-server`` command."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Final, NoReturn, cast

# Waiting OpenMP threads sleep instead of spinning: three servers on two cores otherwise spend three times as long on a
# step as they compute. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from petals_core.errors import ConfigurationError
from petals_core.identity import Identity, receipts_path
from petals_core.swarm_key import SwarmKey
from petals_core.terminal import HELP_WIDTH, describe_version, parse_connectable_addresses, run_app
from petals_core.wire.compression import Mode
from petals_server.comfort.schedule import Schedule
from petals_server.config import PlacementTiming, ServerConfig, ServerLimits, parse_blocks, parse_rate, parse_size
from petals_server.earlier_options import normalize_arguments

_SWITCH_INTERVAL_S: Final = 0.0005
"""The event loop gets the interpreter from the device's thread after this long; Python's default is ten times that."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": HELP_WIDTH},
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(describe_version("petals-server"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve a span of a language model's blocks to a Petals swarm."""


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or its name on the Hugging Face hub.")
    ],
    new_swarm: Annotated[bool, typer.Option("--new-swarm", help="Start a swarm that others join.")] = False,
    initial_peers: Annotated[
        list[str] | None,
        typer.Option("--initial-peers", metavar="HOST:PORT", help="Join the swarm of these peers; may be repeated."),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option("--blocks", metavar="FIRST:END", help="Serve these blocks, for example 0:4.")
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            "--num-blocks", metavar="N", help="Serve so many blocks, where the swarm needs them most [all that fit]."
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            metavar="HOST",
            help="Address to listen on; 0.0.0.0 lets others in [this machine alone, or all if a peer is elsewhere].",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port", metavar="PORT", help="TCP and UDP port; 0: a free one [31330, or a free one where that is taken]."
        ),
    ] = None,
    announce_host: Annotated[
        str | None,
        typer.Option("--announce-host", metavar="HOST", help="Name or address by which others reach this machine."),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    torch_dtype: Annotated[
        str, typer.Option("--torch-dtype", metavar="DTYPE", help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    compile_mode: Annotated[
        str,
        typer.Option(
            "--compile",
            metavar="MODE",
            help="auto, on or off: record decode steps and replay them; auto measures if that is faster.",
        ),
    ] = "auto",
    quantization: Annotated[
        str,
        typer.Option(
            "--quantization", metavar="FORM", help="none, int8, nf4, or auto: nf4 on a GPU and none on a CPU; lossy."
        ),
    ] = "none",
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            metavar="[NAME=]PATH",
            help="LoRA adapters (PEFT's folders or hub names) that clients may choose; may be repeated.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint: it can do anything.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REVISION", help="Branch, tag or commit on the hub.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            metavar="TOKEN",
            envvar="HF_TOKEN",
            show_envvar=False,
            help="Access token of the hub [HF_TOKEN in the environment].",
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", metavar="FOLDER", help="Folder for downloads from the hub.")
    ] = None,
    max_disk_space: Annotated[
        str | None,
        typer.Option(
            "--max-disk-space",
            metavar="SIZE",
            help="What downloads may take, for example 200GB; what was not used for longest is deleted [all there is].",
        ),
    ] = None,
    attn_cache_tokens: Annotated[
        int | None,
        typer.Option(
            "--attn-cache-tokens", metavar="N", help="Tokens that all sessions may hold together [by free memory]."
        ),
    ] = None,
    kept_outputs: Annotated[
        str,
        typer.Option(
            "--kept-outputs",
            metavar="SIZE",
            help="Memory for what sessions passed on, to rebuild a next server that is replaced.",
        ),
    ] = "512MiB",
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Threads that compute [measured].")
    ] = None,
    compression: Annotated[
        str,
        typer.Option(
            "--compression", metavar="WHEN", help="Of what is sent: auto (where it arrives earlier), none or zstd."
        ),
    ] = "auto",
    rebalance_interval: Annotated[
        float,
        typer.Option(
            "--rebalance-interval",
            metavar="SECONDS",
            help="How often a server without --blocks considers other blocks, in a swarm of 50 or more; 0: never.",
        ),
    ] = 15.0,
    schedule: Annotated[
        str | None, typer.Option("--schedule", metavar="HOURS", help="Serve then only, for example 22:00-07:00.")
    ] = None,
    pause_when_busy: Annotated[
        bool, typer.Option("--pause-when-busy", help="Pause while other programs use the device.")
    ] = False,
    prefer_contributors: Annotated[
        bool,
        typer.Option("--prefer-contributors", help="Give clients whose servers compute for others a higher share."),
    ] = False,
    max_upload: Annotated[
        str | None,
        typer.Option(
            "--max-upload",
            metavar="RATE",
            help="Send clients and servers no more than that in a second, for example 20mbit or 2.5MB; the directory's "
            "datagrams, a few kB a second, come on top.",
        ),
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option("--identity", metavar="FILE", help="This server's key; made if there is none [one of yours]."),
    ] = None,
    swarm_key_file: Annotated[
        Path | None,
        typer.Option("--swarm-key-file", metavar="FILE", help="Key of a private swarm; petals-dht keygen makes one."),
    ] = None,
    public_name: Annotated[
        str, typer.Option("--public-name", metavar="NAME", help="Shown to everybody in lists of servers.")
    ] = "",
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more, and show where errors come from.")] = False,
) -> None:
    """Serve blocks of MODEL, in a new swarm or in one that runs.

    Start a swarm with --new-swarm, or join one with --initial-peers. Values in brackets are what happens without an
    option.

    Prints one line with the address by which others join. Ctrl-C gives open sessions a few seconds to end and leaves
    the swarm; a second one leaves at once. Servers can read what passes through them.
    """
    peers = parse_connectable_addresses(initial_peers or [], option="--initial-peers")
    if new_swarm == bool(peers):
        raise ConfigurationError(
            "give either --new-swarm, to start a swarm, or --initial-peers HOST:PORT of a running one, to join it"
        )
    if _looks_like_path(model) and not (Path(model) / "config.json").is_file():
        raise ConfigurationError(f"{model} is not a checkpoint: there is no {Path(model) / 'config.json'}")
    own = Identity.default("server") if identity is None else Identity.load(identity)
    config = ServerConfig(
        model=model,
        initial_peers=peers,
        blocks=None if blocks is None else parse_blocks(blocks),
        num_blocks=num_blocks,
        host=host,
        port=port,
        announce_host=announce_host,
        device=device,
        torch_dtype=torch_dtype,
        quantization=quantization,
        compile=compile_mode,
        trust_remote_code=trust_remote_code,
        adapters=tuple(adapters or ()),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        limits=ServerLimits(max_kept_bytes=parse_size(kept_outputs, "--kept-outputs")),
        max_disk_bytes=None if max_disk_space is None else parse_size(max_disk_space),
        swarm_key=None if swarm_key_file is None else SwarmKey.read(swarm_key_file),
        identity=own,
        public_name=public_name,
        cache_tokens=attn_cache_tokens,
        num_threads=threads,
        compression=cast(Mode, compression),
        placement=None if rebalance_interval == 0 else PlacementTiming(interval_s=rebalance_interval),
        schedule=None if schedule is None else Schedule.parse(schedule),
        pause_when_busy=pause_when_busy,
        prefer_contributors=prefer_contributors,
        receipts=receipts_path(own.peer_id),
        max_upload_bytes_per_s=None if max_upload is None else parse_rate(max_upload),
    )
    _set_up_logging(verbose=verbose)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    from petals_core.net.loop import run
    from petals_server.process import serve_until_told

    run(serve_until_told(config))


@app.command()
def status(
    swarm_key_file: Annotated[
        Path | None, typer.Option("--swarm-key-file", metavar="FILE", help="Key of the servers' private swarm.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show where errors come from.")] = False,
) -> None:
    """Show your servers on this machine: what they hold and have served."""
    from petals_core.net.loop import run
    from petals_server import status as servers

    looked = run(servers.look(None if swarm_key_file is None else SwarmKey.read(swarm_key_file)))
    if as_json:
        typer.echo(json.dumps(servers.to_json(looked), indent=2))
        return
    for record, round_trip_s in looked:
        for line in record.lines(round_trip_s, now_s=time.time()):
            typer.echo(line)


def _set_up_logging(*, verbose: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else "%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.WARNING,
    )
    for name in ("petals_core", "petals_dht", "petals_server"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or Path(model).is_dir()


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    try:
        run_app(partial(app, args=normalize_arguments(sys.argv[1:])))
    except SystemExit as end:
        # Everything is closed by now. Leaving Python the usual way would take torch apart first, for seconds.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
