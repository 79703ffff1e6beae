"""Sessions whose servers fail, leave, or can't reach each other: the tokens are those of the local model."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_client.part_states import decode_states
from petals_client.swarm import Swarm
from petals_client.swarm_session import SwarmSession
from petals_core.errors import MissingBlocksError, PetalsError
from petals_core.steps import StepRequest
from petals_core.tensors.codec import encode
from petals_core.tensors.states import States
from petals_server.config import ServerLimits

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SPANS = ((0, 2), (2, 4), (4, 6))


def prompt(seed: int, rows: int = 1, width: int = 6) -> torch.Tensor:
    return torch.randint(3, 259, (rows, width), generator=torch.Generator().manual_seed(seed))


@contextmanager
def connect(folder: Path, swarm: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Iterator[Any]:
    """A distributed model that is closed at the end; ``settings`` are its options."""
    options = ClientOptions.make(initial_peers=swarm.initial_peers, **settings)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=swarm.initial_peers, options=options, dtype=dtype
    )
    try:
        yield model
    finally:
        model.close()


class At:
    """A stopping criterion that does something when so many tokens are there, and never stops."""

    def __init__(self, count: int, action: Callable[[], None]) -> None:
        self._left = count
        self._action = action

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            self._action()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.fixture(scope="module")
def local(pairs: Any) -> Any:
    return pairs("llama").local


@pytest.mark.parametrize(
    ("kept_bytes", "settings"),
    [(1 << 20, {"num_beams": 3}), (0, {"max_new_tokens": 14})],
    ids=["beams from kept outputs", "greedy from the client's inputs"],
)
def test_servers_are_replaced_one_after_another(
    new_swarm: Any, checkpoints: Any, local: Any, kept_bytes: int, settings: dict[str, Any]
) -> None:
    """By one for all of their blocks; beams change places meanwhile, and rows are padded."""
    swarm, folder = new_swarm(), checkpoints("llama")
    limits = ServerLimits(max_kept_bytes=kept_bytes)
    servers = [swarm.add(folder, start, end, limits=limits) for start, end in SPANS]
    tokens = prompt(0, rows=2, width=9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 12, **GREEDY, **settings}

    def swap(index: int) -> None:
        swarm.add(folder, *SPANS[index], limits=limits)
        swarm.remove(servers[index])

    with connect(folder, swarm) as model:
        criteria = [At(2 + 3 * index, lambda index=index: swap(index)) for index in (0, 1)]
        given = model.generate(tokens, attention_mask=mask, stopping_criteria=criteria, **settings)
        swarm.wait_for_sessions(0)
    assert torch.equal(given, local.generate(tokens, attention_mask=mask, **settings))


def test_only_the_lost_blocks_are_computed_again(new_swarm: Any, checkpoints: Any, local: Any) -> None:
    """Also at a session's first failure: the server before has kept what it passed on."""
    swarm, folder = new_swarm(), checkpoints("llama")
    first, middle, last = (swarm.add(folder, start, end) for start, end in SPANS)
    tokens = prompt(8, width=100)

    def swap() -> None:
        swarm.add(folder, 2, 4)
        swarm.remove(middle)

    with connect(folder, swarm) as model:
        given = model.generate(tokens, max_new_tokens=8, stopping_criteria=[At(4, swap)], **GREEDY)
        swarm.wait_for_sessions(0)
    assert torch.equal(given, local.generate(tokens, max_new_tokens=8, **GREEDY))
    once = tokens.shape[1] + 7
    computed = [server.holding.handler.served.num_tokens for server in (first, swarm.servers[-1], last)]
    assert computed[0] in (once, once + 1), "the step under way is sent again"
    assert computed[1:] == [once, once]


def test_a_long_prompt_is_interrupted(new_swarm: Any, checkpoints: Any, local: Any) -> None:
    """Parts of a prompt are under way everywhere when servers go, two of them at once."""
    swarm, folder = new_swarm(), checkpoints("llama")
    servers = [swarm.add(folder, start, end) for start, end in SPANS]
    for start, end in SPANS[1:]:
        swarm.add(folder, start, end)
    tokens = prompt(1, width=700)
    with connect(folder, swarm) as model, model.inference_session(max_length=720) as session:
        model.generate(tokens[:, :1], max_new_tokens=1, **GREEDY)
        session.truncate(0)
        used = {hop.peer_id for hop in session._remote.chain}

        def remove() -> None:
            for server in servers[1:]:
                if server.peer_id in used:
                    swarm.remove(server)

        timer = threading.Timer(0.02, remove)
        timer.start()
        given = model.generate(tokens, max_new_tokens=4, **GREEDY)
        timer.join()
    assert torch.equal(given, local.generate(tokens, max_new_tokens=4, **GREEDY))


async def penalties(swarm: Swarm) -> set[float]:
    """What is held against anybody."""
    now_s = asyncio.get_running_loop().time()
    return {swarm.health.penalty_s(peer_id, now_s=now_s) for peer_id in await swarm.directory.servers()}


def test_a_server_that_makes_room_for_an_older_session(new_swarm: Any, checkpoints: Any, local: Any) -> None:
    """The younger session loses its pages there; it is computed again where it was, and nobody is blamed."""
    swarm, folder = new_swarm(), checkpoints("llama")
    tight = [swarm.add(folder, start, end, cache_tokens=208 if start == 2 else 1024) for start, end in SPANS][1]
    tokens = prompt(10, width=180)
    with connect(folder, swarm) as older, connect(folder, swarm) as model, ExitStack() as stack:
        stack.enter_context(older.inference_session(max_length=192))
        older.generate(prompt(11), max_new_tokens=2, **GREEDY)

        def squeeze() -> None:
            older.generate(None, max_new_tokens=30, **GREEDY)  # within what it was promised
            stack.close()

        given = model.generate(tokens, max_new_tokens=12, stopping_criteria=[At(4, squeeze)], **GREEDY)
        assert tight.holding.handler.sessions.num_evicted == 1
        assert model.remote_blocks.chain.run(penalties) == {0.0}
    assert torch.equal(given, local.generate(tokens, max_new_tokens=12, **GREEDY))


def test_a_server_that_gives_up_an_idle_session(new_swarm: Any, checkpoints: Any, local: Any) -> None:
    swarm, folder = new_swarm(), checkpoints("llama")
    for start, end in SPANS:
        swarm.add(folder, start, end, limits=ServerLimits(max_idle_s=0.3) if start == 2 else ServerLimits())
    tokens = prompt(12)
    with connect(folder, swarm) as model, model.inference_session(max_length=40):
        model.generate(tokens, max_new_tokens=3, **GREEDY)
        swarm.wait_for_sessions(2)
        given = model.generate(None, max_new_tokens=4, **GREEDY)
        assert model.remote_blocks.chain.run(penalties) == {0.0}
    assert torch.equal(given[:, -4:], local.generate(tokens, max_new_tokens=7, **GREEDY)[:, -4:])


@contextmanager
def freezable(swarm: Any, new_swarm: Any) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Servers of the same swarm that can be frozen all at once: their connections stay open and take nothing."""
    others, release = new_swarm(), threading.Event()
    others.initial_peers = swarm.initial_peers
    try:
        yield others, lambda: others._loop.call_soon_threadsafe(release.wait)
    finally:
        release.set()


def test_a_server_that_hangs_while_much_is_sent(new_swarm: Any, checkpoints: Any) -> None:
    """More than may wait for the network: the sender is stuck, and still the server is given up by the step's clock."""
    swarm, folder = new_swarm(), checkpoints("llama")
    num_rows, num_columns = 64, 320
    tokens = torch.randn(num_rows * num_columns, 64, generator=torch.Generator().manual_seed(0))

    def parts(columns: int) -> list[tuple[StepRequest, States]]:
        spec, payload = encode(tokens[: num_rows * columns])
        request = StepRequest(keep=0, row_tokens=(columns,) * num_rows)
        return [(replace(request, keep=keep), States(spec=spec, payload=payload)) for keep in (0, columns)]

    async def run(others: Any, freeze: Callable[[], None]) -> None:
        hung = await asyncio.to_thread(others.add, folder, 0, 1, cache_tokens=65_536)
        client = Swarm(
            ClientOptions.make(initial_peers=swarm.initial_peers),
            model_name="tiny",
            fingerprint=hung.model.fingerprint,
            num_blocks=6,
            torch_dtype="float32",
        )
        session, undisturbed = (
            SwarmSession(client, start=0, end=1, num_rows=num_rows, max_length=2 * num_columns) for _ in range(2)
        )
        try:
            await session.open()
            await session.step(parts(2))  # what such parts take is known now
            other = await asyncio.to_thread(swarm.add, folder, 0, 1, cache_tokens=65_536)
            await client.directory.refresh()
            assert [hop.peer_id for hop in session.chain] == [hung.peer_id]
            freeze()
            given = await session.step(parts(num_columns))
            assert [hop.peer_id for hop in session.chain] == [other.peer_id]
            record = client.health.record(hung.peer_id)
            assert record is not None
            assert record.reason.startswith("no answer to a step within")
            session.close()  # its room is needed
            await undisturbed.open()
            for one, two in zip(given, await undisturbed.step(parts(num_columns)), strict=True):
                assert torch.equal(decode_states(one), decode_states(two))
        finally:
            session.close()
            undisturbed.close()
            await client.close()

    with freezable(swarm, new_swarm) as (others, freeze):
        asyncio.run(run(others, freeze))


def test_a_server_falls_silent_while_another_is_replaced(new_swarm: Any, checkpoints: Any, local: Any) -> None:
    """The one that is to send what it has kept: nobody waits for it as long as it may take to connect."""
    swarm, folder = new_swarm(), checkpoints("llama")
    tokens = prompt(13)
    with freezable(swarm, new_swarm) as (others, freeze):
        others.add(folder, *SPANS[0])
        leaving, _ = (swarm.add(folder, start, end) for start, end in SPANS[1:])

        def strike() -> None:
            for start, end in SPANS[:2]:
                swarm.add(folder, start, end)
            model.remote_blocks.chain.run(lambda known: known.directory.refresh())
            swarm.remove(leaving)
            freeze()

        with connect(folder, swarm, connect_timeout_s=600.0) as model:
            given = model.generate(tokens, max_new_tokens=8, stopping_criteria=[At(3, strike)], **GREEDY)
    assert torch.equal(given, local.generate(tokens, max_new_tokens=8, **GREEDY))


def test_servers_that_can_not_reach_each_other(
    new_swarm: Any, checkpoints: Any, local: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The client carries the states between them and says so; also when the way breaks in the middle."""
    swarm, folder = new_swarm(), checkpoints("llama")
    servers = [swarm.add(folder, start, end) for start, end in SPANS]
    tokens = prompt(2, width=80)

    def isolate(server: Any) -> None:
        swarm.run(server.holding.handler.ring.next_hops.dialer.close())

    isolate(servers[0])
    with connect(folder, swarm) as model, model.inference_session(max_length=100) as session:
        with caplog.at_level(logging.WARNING, "petals_client"):
            given = model.generate(
                tokens, max_new_tokens=8, stopping_criteria=[At(4, lambda: isolate(servers[1]))], **GREEDY
            )
        first, last = session.trace()[0], session.trace()[-1]
        assert [hop.is_carried for hop in first.hops[:3]] == [False, True, False]
        assert [hop.is_carried for hop in last.hops] == [False, True, True]
        lines = [record.getMessage() for record in caplog.records if "carries" in record.getMessage()]
        assert len(lines) == 2, "once for each way"
    assert torch.equal(given, local.generate(tokens, max_new_tokens=8, **GREEDY))


def test_waiting_until_somebody_comes(
    new_swarm: Any, checkpoints: Any, local: Any, caplog: pytest.LogCaptureFixture
) -> None:
    swarm, folder = new_swarm(), checkpoints("llama")
    leaving = [swarm.add(folder, start, end) for start, end in SPANS][1]
    tokens = prompt(3)
    came: list[threading.Timer] = []

    def leave() -> None:
        swarm.remove(leaving)
        came.append(threading.Timer(0.5, lambda: (swarm.add(folder, 3, 5), swarm.add(folder, 2, 3))))
        came[0].start()

    with connect(folder, swarm) as model, caplog.at_level(logging.WARNING, "petals_client"):
        given = model.generate(tokens, max_new_tokens=8, stopping_criteria=[At(3, leave)], **GREEDY)
        came[0].join()
    assert torch.equal(given, local.generate(tokens, max_new_tokens=8, **GREEDY))
    told = [record.getMessage() for record in caplog.records]
    assert any("waiting for a server of blocks 2:4" in line for line in told)
    assert not any("try again" in line for line in told), "the client does so by itself"


@pytest.mark.parametrize("opens_session", [True, False], ids=["session", "forward"])
def test_what_begins_waits_for_servers_that_were_there(
    new_swarm: Any, checkpoints: Any, local: Any, opens_session: bool
) -> None:
    """A new session, and a batch. Where nobody has ever held some blocks, both fail at once (``test_sessions.py``)."""
    swarm, folder = new_swarm(), checkpoints("llama")
    leaving = [swarm.add(folder, start, end) for start, end in SPANS][1]
    tokens = prompt(3)
    waits = threading.Event()

    class Noticing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "blocks 2:4 of tiny-llama are held by no live server" in record.getMessage():
                waits.set()

    handler = Noticing()
    logging.getLogger("petals_client").addHandler(handler)
    coming = threading.Thread(target=lambda: waits.wait(60) and swarm.add(folder, 2, 4))
    try:
        with connect(folder, swarm) as model, torch.no_grad():
            swarm.remove(leaving)
            model.remote_blocks.chain.run(lambda known: known.directory.refresh())
            coming.start()
            if opens_session:
                given = model.generate(tokens, max_new_tokens=3, **GREEDY)
                assert torch.equal(given, local.generate(tokens, max_new_tokens=3, **GREEDY))
            else:
                assert torch.allclose(model(tokens, use_cache=False).logits, local(tokens).logits, atol=1e-4)
    finally:
        waits.set()
        coming.join()
        logging.getLogger("petals_client").removeHandler(handler)
    assert waits.is_set()


def test_waiting_ends(new_swarm: Any, checkpoints: Any) -> None:
    swarm, folder = new_swarm(), checkpoints("llama")
    leaving = [swarm.add(folder, start, end) for start, end in SPANS][1]
    with connect(folder, swarm, recovery_timeout_s=0.5) as model, pytest.raises(PetalsError) as caught:
        model.generate(prompt(4), max_new_tokens=8, stopping_criteria=[At(3, lambda: swarm.remove(leaving))], **GREEDY)
    assert not isinstance(caught.value, MissingBlocksError) or "2:4" in caught.value.message


def test_a_server_that_drains_is_left_without_a_failed_step(
    new_swarm: Any, checkpoints: Any, local: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is gone long before its bound, because its sessions have moved."""
    swarm, folder = new_swarm(), checkpoints("llama")
    holders = [swarm.add(folder, start, end) for start, end in (*SPANS, SPANS[1])][1::2]
    tokens = prompt(5)
    stopping: list[Any] = []
    with connect(folder, swarm) as model, model.inference_session(max_length=40) as session:
        model.generate(tokens, max_new_tokens=2, **GREEDY)
        used = {hop.peer_id for hop in session._remote.chain}
        (leaving,) = [holder for holder in holders if holder.peer_id in used]

        def drain() -> None:
            swarm.servers.remove(leaving)
            stopping.append(swarm.start(leaving.stop(drain_timeout_s=50.0)))
            swarm.run(_until_draining(leaving))

        with caplog.at_level(logging.INFO, "petals_client"):
            session.truncate(0)
            given = model.generate(tokens, max_new_tokens=10, stopping_criteria=[At(4, drain)], **GREEDY)
        stopping[0].result(timeout=20)
        assert leaving.peer_id not in {hop.peer_id for hop in session._remote.chain}
        assert not [record for record in caplog.records if "failed" in record.getMessage()]
    assert torch.equal(given, local.generate(tokens, max_new_tokens=10, **GREEDY))


async def _until_draining(server: Any) -> None:
    while server._listener._is_draining is False:  # noqa: ASYNC110 -- servers have no event for it
        await asyncio.sleep(0.001)


def test_a_chain_works_without_bootstrap_nodes(new_swarm: Any, checkpoints: Any, local: Any) -> None:
    """Nobody is asked for anything on the path of a step; a failure is mended with what servers know of each other."""
    swarm, folder = new_swarm(), checkpoints("llama")
    leaving = [swarm.add(folder, start, end) for start, end in SPANS][2]
    tokens = prompt(6)

    def swap() -> None:
        swarm.add(folder, 4, 6)
        swarm.run(swarm._bootstrap.close())
        swarm.remove(leaving)

    with connect(folder, swarm) as model:
        given = model.generate(tokens, max_new_tokens=8, stopping_criteria=[At(3, swap)], **GREEDY)
    assert torch.equal(given, local.generate(tokens, max_new_tokens=8, **GREEDY))


def test_bfloat16_tokens_that_were_given_stay(new_swarm: Any, checkpoints: Any) -> None:
    """And the rest is what a local model gives whose cache is rebuilt at that point, but for ties of rounding."""
    swarm, folder = new_swarm(), checkpoints("llama")
    leaving = [swarm.add(folder, start, end, torch_dtype="bfloat16") for start, end in SPANS][1]
    tokens, given_before = prompt(7), []

    class Noting(At):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            given_before.append(input_ids.clone())
            return super().__call__(input_ids, scores, **kwargs)

    def swap() -> None:
        swarm.add(folder, 2, 4, torch_dtype="bfloat16")
        swarm.remove(leaving)

    with connect(folder, swarm, torch.bfloat16) as model:
        given = model.generate(tokens, max_new_tokens=10, stopping_criteria=[Noting(4, swap)], **GREEDY)
    for before in given_before:
        assert torch.equal(given[:, : before.shape[1]], before)
    rebuilt = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    num_before = given_before[3].shape[1]
    with torch.no_grad():
        output = rebuilt(given[:, :num_before])
        for token in given[0, num_before:]:
            logits = output.logits[0, -1].float()
            assert logits.max() - logits[token] <= 4 * 2**-8 * logits.abs().max(), "a few units in the last place"
            output = rebuilt(token.view(1, 1), past_key_values=output.past_key_values)
