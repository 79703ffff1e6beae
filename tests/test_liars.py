"""Servers that lie: a generation goes on without them, and nobody else is blamed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_client.swarm import Swarm
from petals_client.swarm_session import SwarmSession
from petals_core.errors import (
    CacheLostError,
    DrainingError,
    InvalidRequestError,
    NextHopError,
    OverloadedError,
    PetalsError,
    RemoteFailureError,
)
from petals_core.steps import StepRequest
from petals_core.tensors.codec import encode
from petals_core.tensors.states import States
from petals_core.wire.messages import Backward, Body, Forward, InfoRequest, OpenSession, Replay, Route, Step
from petals_server.testing import InProcessSwarm

sys.path.insert(0, str(Path(__file__).parent))

from impostor import Impostor, Lie

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "speculation": "off"}
LOCAL = {name: value for name, value in GREEDY.items() if name != "speculation"}
SPANS = ((0, 2), (2, 4), (4, 6))
PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("llama")


@pytest.fixture(scope="module")
def local(pairs: Any) -> Any:
    return pairs("llama").local


@pytest.fixture(scope="module")
def swarm(folder: Path) -> Iterator[InProcessSwarm]:
    """Three honest servers."""
    made = InProcessSwarm()
    for start, end in SPANS:
        made.add(folder, start, end)
    yield made
    made.close()


class Scene:
    """The honest servers, impostors that a client will prefer to those beside them, and the client's model."""

    def __init__(self, swarm: InProcessSwarm, folder: Path, *lies: tuple[int, Lie], without: int | None = None) -> None:
        """``lies`` are places in the chain and what is said there; ``without`` the place of a server not to be used."""
        self.swarm = swarm
        self.servers = swarm.servers
        self.impostors = [
            swarm.run(Impostor.start(self.servers[index], lie, swarm.initial_peers)) for index, lie in lies
        ]
        usable = [server for index, server in enumerate(self.servers) if index != without]
        options = ClientOptions.make(
            initial_peers=swarm.initial_peers,
            allowed_servers=tuple(str(each.peer_id) for each in (*usable, *self.impostors)),
        )
        self.model: Any = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[], options=options)

        async def blame(known: Swarm) -> None:
            for index, _ in lies:
                known.blame(self.servers[index].peer_id, RemoteFailureError("said for the test's sake"))

        self.model.remote_blocks.chain.run(blame)

        self.honest = self.servers[lies[0][0]]
        """Beside the first impostor."""

    @property
    def impostor(self) -> Impostor:
        return self.impostors[0]

    def num_failures(self, *servers: Any) -> list[int]:
        """What the client holds against servers."""

        async def count(known: Swarm) -> list[int]:
            return [known.health.num_failures(server.peer_id) for server in servers]

        counts: list[int] = self.model.remote_blocks.chain.run(count)
        return counts

    def close(self) -> None:
        self.model.close()
        for impostor in self.impostors:
            self.swarm.run(impostor.close())
        self.swarm.wait_for_sessions(0)


@pytest.fixture
def scene(swarm: InProcessSwarm, folder: Path) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(*lies: tuple[int, Lie], **settings: Any) -> Scene:
        made.append(Scene(swarm, folder, *lies, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def always(error: Callable[[], PetalsError], *kinds: type[Body]) -> Lie:
    """Say so to all requests of some kinds; of none: do what is asked."""
    return lambda body: error() if isinstance(body, kinds) else None


def wrong() -> PetalsError:
    return InvalidRequestError("the request is wrong")


# --- that the request is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "index"),
    [((Body,), 0), ((OpenSession,), 1), ((Route,), 1), ((Step,), 0), ((Step,), 2)],
    ids=["everything", "opening", "its place", "steps, first", "steps, last"],
)
def test_who_calls_everything_wrong_ends_no_generation(
    scene: Callable[..., Scene], local: Any, kinds: Any, index: int
) -> None:
    """It is blamed, when another one has done what it refused, and the next session does without it."""
    kinds = tuple(kind for kind in kinds if kind is not Body) or (
        OpenSession,
        Route,
        Step,
        Forward,
        InfoRequest,
        Replay,
    )
    staged = scene((index, always(wrong, *kinds)))
    for _ in range(2):
        given = staged.model.generate(PROMPT, max_new_tokens=6, **GREEDY)
        assert torch.equal(given, local.generate(PROMPT, max_new_tokens=6, **LOCAL))
        assert staged.num_failures(staged.impostor, *staged.servers) == [1, 0, 0, 0]


def test_where_nobody_else_can_be_asked_the_error_names_who_said_so(scene: Callable[..., Scene]) -> None:
    staged = scene((1, always(wrong, Step)), without=1)
    with pytest.raises(InvalidRequestError) as caught:
        staged.model.generate(PROMPT, max_new_tokens=6, **GREEDY)
    name = staged.impostor.peer_id.short
    assert caught.value.message == f"server {name} (blocks 2:4) failed: the request is wrong"
    assert staged.num_failures(staged.impostor) == [0]


def test_a_request_that_two_servers_call_wrong_is_wrong_and_bans_nobody(scene: Callable[..., Scene]) -> None:
    staged = scene((0, always(wrong)))  # it tells no lies
    spec, payload = encode(torch.zeros(1, 64))

    async def run(known: Swarm) -> None:
        known.praise(staged.honest.peer_id)
        session = SwarmSession(known, start=0, end=6, num_rows=1, max_length=16)
        try:
            await session.open()
            for keep, expected in ((0, None), (7, "a step keeps 7 columns where only 1 are cached")):
                step = session.step([(StepRequest(keep=keep, row_tokens=(1,)), States(spec=spec, payload=payload))])
                with (
                    contextlib.nullcontext() if expected is None else pytest.raises(InvalidRequestError, match=expected)
                ):
                    await step
        finally:
            session.close()

    staged.model.remote_blocks.chain.run(run)
    assert staged.num_failures(staged.impostor, *staged.servers) == [0, 0, 0, 0]


@pytest.mark.parametrize("backward", [False, True])
def test_who_calls_forwards_or_backwards_wrong(scene: Callable[..., Scene], local: Any, backward: bool) -> None:
    staged = scene((1, always(wrong, Backward if backward else Forward)))
    embeddings = local.get_input_embeddings()(PROMPT).detach()
    gradients = []
    for model in (staged.model, local):
        inputs = embeddings.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=inputs, use_cache=False).logits.square().sum(), inputs)
        gradients.append(gradient)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    assert staged.impostor.num_lies == 1
    assert staged.num_failures(staged.impostor, *staged.servers) == [1, 0, 0, 0]


# --- that they can't now ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        lambda: OverloadedError("too busy", retry_after_s=0.01),
        lambda: DrainingError("about to stop"),
        lambda: NextHopError("the next server can't be reached any more"),
        lambda: CacheLostError("the cache is lost", retry_after_s=0.01),
    ],
    ids=["overloaded", "draining", "no next server", "cache lost"],
)
def test_who_says_for_ever_that_it_can_not_now_is_left(
    scene: Callable[..., Scene], local: Any, error: Callable[[], PetalsError]
) -> None:
    staged = scene((1, always(error, Step)))
    given = staged.model.generate(PROMPT, max_new_tokens=6, **GREEDY)
    assert torch.equal(given, local.generate(PROMPT, max_new_tokens=6, **LOCAL))
    assert 0 < staged.impostor.num_lies <= 4
    assert staged.num_failures(*staged.servers) == [0, 0, 0]


@pytest.mark.parametrize("kind", [Forward, Backward])
def test_who_says_for_ever_that_it_is_too_busy_for_a_batch(scene: Callable[..., Scene], local: Any, kind: Any) -> None:
    staged = scene((1, always(lambda: OverloadedError("too busy", retry_after_s=0.01), kind)))
    inputs = local.get_input_embeddings()(PROMPT).detach().requires_grad_()
    torch.autograd.grad(staged.model(inputs_embeds=inputs, use_cache=False).logits.sum(), inputs)
    assert staged.impostor.num_lies == 2


# --- that they have rebuilt others ------------------------------------------------------------------------------------


async def says_nothing_was_there(impostor: Impostor, request: Replay, session: Any) -> int | None:
    return None


async def says_less(impostor: Impostor, request: Replay, session: Any) -> int | None:
    return 0


async def sends_less(impostor: Impostor, request: Replay, session: Any) -> int | None:
    """One token in the place of all of them, under the right number."""
    spec, payload = encode(torch.zeros(1, 64))
    step = Step(
        step=request.before - 1,
        keep=0,
        row_tokens=(1,),
        tensors=(spec.to_wire(),),
        deadline_ms=5000,
        attempt=request.attempt,
        passes=request.passes,
    )
    await session.stream.send(step, payload)
    return request.before - 1


@pytest.mark.parametrize(
    ("replayed", "is_proven"),
    [(says_nothing_was_there, True), (says_less, True), (sends_less, False)],
)
def test_who_did_not_rebuild_another_as_it_says(
    scene: Callable[..., Scene], local: Any, replayed: Any, is_proven: bool
) -> None:
    """Blamed where the client knows better; else the other server is rebuilt once more from elsewhere."""
    fails_later = always(lambda: RemoteFailureError("broken"), Step)
    staged = scene((1, always(wrong)), (2, lambda body: fails_later(body) if getattr(body, "keep", 0) > 6 else None))
    staged.impostor.replayed = replayed
    given = staged.model.generate(PROMPT, max_new_tokens=8, **GREEDY)
    assert torch.equal(given, local.generate(PROMPT, max_new_tokens=8, **LOCAL))
    assert [impostor.num_lies for impostor in staged.impostors] == [1, 1]
    # What was said against the one beside it stands until that computes something.
    assert staged.num_failures(*staged.impostors, *staged.servers) == [int(is_proven), 1, 0, int(not is_proven), 0]


# --- what they pass on ------------------------------------------------------------------------------------------------


def test_who_passes_on_another_step_than_it_was_sent(scene: Callable[..., Scene], local: Any) -> None:
    staged = scene((1, always(wrong)))
    staged.impostor.passes_on = lambda step: replace(step, keep=step.keep + 1)
    given = staged.model.generate(PROMPT, max_new_tokens=6, **GREEDY)
    assert torch.equal(given, local.generate(PROMPT, max_new_tokens=6, **LOCAL))
    assert staged.num_failures(staged.impostor, *staged.servers) == [1, 0, 0, 0]
