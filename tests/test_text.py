"""Text in, text out through servers: the four calls, their asyncio twin, and the command."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import typer.testing
from transformers import AutoTokenizer

import petals_client
from petals_client.cli import app
from petals_core.errors import InvalidRequestError, MissingBlocksError

PROMPT = "What is a list?"


@pytest.fixture(scope="module")
def pair(pairs: Any) -> Any:
    return pairs("demo")


@pytest.fixture(scope="module")
def arguments(pair: Any) -> dict[str, Any]:
    return {"initial_peers": pair.swarm.initial_peers, "dtype": "float32"}


@pytest.fixture(scope="module")
def client(pair: Any, arguments: dict[str, Any]) -> Iterator[petals_client.Client]:
    with petals_client.connect(pair.folder, **arguments) as client:
        yield client


def answer_locally(pair: Any, messages: list[dict[str, str]] | str, max_new_tokens: int) -> str:
    """What the local model says, taking the likeliest tokens."""
    tokenizer = AutoTokenizer.from_pretrained(pair.folder)
    if isinstance(messages, str):
        inputs = tokenizer(messages, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    else:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    sequences = pair.local.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    text: str = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_four_calls(pair: Any, arguments: dict[str, Any]) -> None:
    client = petals_client.connect(pair.folder, **arguments)
    expected = answer_locally(pair, PROMPT, 12)
    assert client.generate(PROMPT, max_new_tokens=12) == expected
    pieces = list(client.generate(PROMPT, max_new_tokens=12, stream=True))
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    status = client.status()
    assert (status.num_blocks, status.missing, len(status.servers), len(status.chain)) == (8, (), 3, 3)
    assert "chain: " in str(status)
    client.close()
    client.close()
    with pytest.raises(InvalidRequestError, match="this client was closed"):
        client.generate(PROMPT, max_new_tokens=1)
    pair.swarm.wait_for_sessions(0)


def test_what_generate_takes(client: petals_client.Client) -> None:
    sampled = [client.generate(PROMPT, max_new_tokens=8, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    beams = client.generate(PROMPT, max_new_tokens=8, num_beams=3, repetition_penalty=1.2)
    assert beams != client.generate(PROMPT, max_new_tokens=8)


def test_leaving_a_stream_frees_the_servers(client: petals_client.Client, pair: Any) -> None:
    stream = client.generate(PROMPT, max_new_tokens=500, stream=True, eos_token_id=None)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    pair.swarm.wait_for_sessions(0)


def test_asyncio(pair: Any, arguments: dict[str, Any]) -> None:
    async def run() -> tuple[list[str], str, int]:
        async with await petals_client.connect_async(pair.folder, **arguments) as client:
            texts = await asyncio.gather(*(client.generate(PROMPT, max_new_tokens=12) for _ in range(2)))
            streamed = "".join([piece async for piece in client.stream(PROMPT, max_new_tokens=12)])
            cancelled = asyncio.create_task(client.generate(PROMPT, max_new_tokens=500, eos_token_id=None))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            return texts, streamed, (await client.status()).num_blocks

    expected = answer_locally(pair, PROMPT, 12)
    assert asyncio.run(run()) == ([expected, expected], expected, 8)
    pair.swarm.wait_for_sessions(0)


# --- the command ------------------------------------------------------------------------------------------------------


def run_command(pair: Any, name: str, *words: str, typed: str | None = None) -> Any:
    command = [name, str(pair.folder), *words, "--initial-peers", pair.swarm.initial_peers[0]]
    result = typer.testing.CliRunner().invoke(app, command, input=typed)
    assert result.exit_code == 0, result.output
    return result


def test_generate_command(pair: Any) -> None:
    settings = ("--max-new-tokens", "12", "--torch-dtype", "float32", "--trace")
    result = run_command(pair, "generate", PROMPT, *settings)
    assert result.stdout == answer_locally(pair, PROMPT, 12) + "\n"
    assert "12 steps" in result.stderr
    assert result.stderr.count("blocks ") == 3
    pair.swarm.wait_for_sessions(0)


def test_chat_command(pair: Any) -> None:
    result = run_command(
        pair, "chat", "--max-new-tokens", "12", "--torch-dtype", "float32", typed=f"{PROMPT}\nAnd a tuple?\n\n"
    )
    first = answer_locally(pair, [{"role": "user", "content": PROMPT}], 12)
    turns = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And a tuple?"},
    ]
    assert result.stdout.replace("> ", "") == f"{first}\n{answer_locally(pair, turns, 12)}\n"
    pair.swarm.wait_for_sessions(0)


def test_chat_asks_for_nothing_while_blocks_are_missing(pair: Any, new_swarm: Any) -> None:
    swarm = new_swarm()
    swarm.add(pair.folder, 0, 4)
    command = ["chat", str(pair.folder), "--initial-peers", swarm.initial_peers[0]]
    result = typer.testing.CliRunner().invoke(app, command, input=f"{PROMPT}\n\n")
    assert isinstance(result.exception, MissingBlocksError)
    assert "blocks 4:8" in result.exception.message
    assert result.stdout == ""
    assert "Looking for servers" in result.stderr


def test_status_command(pair: Any) -> None:
    result = run_command(pair, "status")
    assert "8 blocks, 3 servers" in result.stdout
