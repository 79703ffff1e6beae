"""Text in, text out, on a chain in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from petals_client.client import AsyncClient, Client, generation_settings, load_tokenizer
from petals_client.conversation import Conversation
from petals_core.errors import CheckpointError, InvalidRequestError, RemoteFailureError, SessionLengthError


@pytest.fixture
def client(swarm: Any) -> Iterator[Client]:
    client = Client(swarm.model, load_tokenizer(swarm.folder))
    yield client
    assert not swarm.chain.open_sessions


def test_what_comes_behind_the_prompt(client: Client, local: Any) -> None:
    text = client.generate("hello", max_new_tokens=8)
    inputs = client.encode("hello")
    expected = local.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = expected[0, inputs["input_ids"].shape[1] :]
    assert text == client.tokenizer.decode(new, skip_special_tokens=True)


def test_pieces_make_up_the_text(client: Client) -> None:
    pieces = list(client.generate("hello", max_new_tokens=8, stream=True))
    assert "".join(pieces) == client.generate("hello", max_new_tokens=8)


def test_sampling_is_repeatable_with_a_seed(client: Client) -> None:
    def sample(seed: int, stream: bool = False) -> str:
        return "".join(
            client.generate("hello", max_new_tokens=8, temperature=1.0, top_p=0.95, seed=seed, stream=stream)
        )

    assert sample(1) == sample(1) == sample(1, stream=True)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_leaving_a_stream_early_ends_the_generation(client: Client, swarm: Any) -> None:
    before = swarm.chain.num_steps
    pieces = client.generate("hello", max_new_tokens=400, stream=True, eos_token_id=None)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert swarm.chain.num_steps - before < 300


def test_errors_come_out_of_the_stream(client: Client, swarm: Any) -> None:
    swarm.chain.fail_next_step = True
    with pytest.raises(RemoteFailureError, match="the server broke"):
        list(client.generate("hello", stream=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "ask for at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_settings_out_of_range(client: Client, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        client.generate("hello", **settings)


def test_what_settings_mean() -> None:
    def settings(temperature: float | None, top_p: float | None) -> dict[str, Any]:
        return generation_settings(max_new_tokens=1, temperature=temperature, top_p=top_p)

    assert (
        settings(None, None) == settings(0.0, None) == settings(0.0, 0.5) == {"max_new_tokens": 1, "do_sample": False}
    )
    assert settings(None, 0.5) == {"max_new_tokens": 1, "do_sample": True, "top_p": 0.5}
    assert settings(0.7, None) == {"max_new_tokens": 1, "do_sample": True, "temperature": 0.7}


def test_asyncio(client: Client) -> None:
    async def run() -> tuple[str, list[str], int]:
        asynchronous = AsyncClient(client)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        pieces = [piece async for piece in asynchronous.stream("hello", max_new_tokens=8)]
        ticking.cancel()
        return await asynchronous.generate("hello", max_new_tokens=8), pieces, ticks

    text, pieces, ticks = asyncio.run(run())
    assert text == "".join(pieces) == client.generate("hello", max_new_tokens=8)
    assert ticks > 0, "the event loop was blocked"


def test_cancelling_an_asynchronous_generation(client: Client, swarm: Any) -> None:
    async def run() -> None:
        stream = AsyncClient(client).stream("hello", max_new_tokens=400, eos_token_id=None)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    before = swarm.chain.num_steps
    asyncio.run(run())
    assert swarm.chain.num_steps - before < 300


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer that Transformers can read"):
        load_tokenizer(tmp_path)


def test_a_conversation_sends_only_what_is_new(client: Client, swarm: Any) -> None:
    settings = generation_settings(max_new_tokens=4, temperature=None, top_p=None) | {"eos_token_id": None}
    spoken: list[str] = []
    with Conversation(client, max_length=200, settings=settings) as conversation:
        first = conversation.reply("hello", spoken.append)
        session = conversation._session
        position = session.position
        assert "".join(spoken) == first
        conversation.reply("and now?", spoken.append)
        assert position < session.position
        # After an error the turn has not happened.
        swarm.chain.fail_next_step = True
        before = session.output_ids
        with pytest.raises(RemoteFailureError):
            conversation.reply("lost?", spoken.append)
        assert session.output_ids is not None
        assert session.output_ids.equal(before)
        conversation.reply("again", spoken.append)
        with pytest.raises(SessionLengthError, match="begin another one"):
            conversation.reply("x" * 300, spoken.append)
