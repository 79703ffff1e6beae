"""The command ``petals-client``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petals_core.errors import ConfigurationError, PetalsError
from petals_core.terminal import parse_connectable_addresses, run_app, stderr_console

if TYPE_CHECKING:
    from petals_client.client import Client

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Use a language model that a swarm of servers runs.",
)

Model = Annotated[str, typer.Argument(help="A folder, or a name on the Hugging Face hub.", show_default=False)]
InitialPeers = Annotated[
    list[str],
    typer.Option("--initial-peers", help="HOST:PORT of a peer of the swarm; may be repeated.", show_default=False),
]
SwarmKeyFile = Annotated[Path | None, typer.Option(help="Key of a private swarm.", show_default=False)]
TorchDtype = Annotated[str, typer.Option(help="What this client computes in; auto: as the checkpoint is stored.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a model on the hub.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(help="How many tokens to generate at most.")]
Temperature = Annotated[
    float | None, typer.Option(help="Above 0 to sample; by default the likeliest token is taken.", show_default=False)
]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this share.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Make sampling repeatable.", show_default=False)]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what happens, and tracebacks.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False)],
    initial_peers: InitialPeers,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    torch_dtype: TorchDtype = "auto",
    revision: Revision = None,
    swarm_key_file: SwarmKeyFile = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show at the end where the time went.")] = False,
    verbose: Verbose = False,
) -> None:
    """Continue a text and print it as it comes."""
    client = _connect(model, initial_peers, swarm_key_file, torch_dtype, revision, verbose)
    with client:
        from petals_client.client import generation_settings, seeded
        from petals_client.text import PieceStreamer
        from petals_client.trace import format_trace

        settings = generation_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
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
    max_length: Annotated[int, typer.Option(help="Tokens that the conversation may have.")] = 4096,
    torch_dtype: TorchDtype = "auto",
    revision: Revision = None,
    swarm_key_file: SwarmKeyFile = None,
    verbose: Verbose = False,
) -> None:
    """Hold a conversation; the servers keep what was said, so that only new tokens travel."""
    from petals_client.client import generation_settings

    settings = generation_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    client = _connect(model, initial_peers, swarm_key_file, torch_dtype, revision, verbose)
    console = stderr_console()
    with client:
        from petals_client.client import seeded
        from petals_client.conversation import Conversation

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
    verbose: Verbose = False,
) -> None:
    """Show a model's live servers and the chain that a client would use."""
    _set_up_logging(verbose)
    from petals_client.options import ClientOptions
    from petals_client.status import read_status
    from petals_client.swarm_chain import SwarmChain
    from petals_core.models.checkpoint import Checkpoint

    options = ClientOptions.make(initial_peers=_addresses(initial_peers), swarm_key_file=swarm_key_file)
    chain = SwarmChain.connect(Checkpoint.open(model, revision=revision), options)
    try:
        print(chain.run(read_status))
    finally:
        chain.close()


def main() -> None:
    """Run the command line."""
    run_app(app)


def _connect(
    model: str,
    initial_peers: list[str],
    swarm_key_file: Path | None,
    torch_dtype: str,
    revision: str | None,
    verbose: bool,
) -> Client:
    """Check what can be checked before anything heavy is imported, then connect."""
    addresses = _addresses(initial_peers)
    if torch_dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise ConfigurationError(f"--torch-dtype {torch_dtype}: choose auto, float32, float16 or bfloat16")
    _set_up_logging(verbose)
    from petals_client.client import connect

    return connect(
        model,
        initial_peers=addresses,
        swarm_key_file=swarm_key_file,
        dtype=None if torch_dtype == "auto" else torch_dtype,
        revision=revision,
    )


def _addresses(initial_peers: list[str]) -> tuple[Any, ...]:
    return parse_connectable_addresses(initial_peers, option="--initial-peers")


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
