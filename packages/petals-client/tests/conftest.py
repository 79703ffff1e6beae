"""A chain in this process: spans of a tiny model that are called directly, as servers would compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petals_client.auto import load_model
from petals_client.chain import StepRequest
from petals_core.errors import InvalidRequestError, PetalsError, RemoteFailureError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_core.testing.factories import apply_caps, make_checkpoint


class LocalChain:
    """Computes each span in turn, row by row without pads, and counts what it is asked for."""

    def __init__(self, checkpoint: Checkpoint, cuts: tuple[int, ...]) -> None:
        self.spans = [load_span(checkpoint, start, end) for start, end in pairwise(cuts)]
        self.num_blocks = cuts[-1]
        self.num_forwards = 0
        self.num_steps = 0
        self.open_sessions: set[LocalSession] = set()
        self.fail_next_step = False
        self.is_closed = False

    def between(self, start: int, end: int) -> list[Span]:
        chosen = [span for span in self.spans if start <= span.start and span.end <= end]
        if not chosen or (chosen[0].start, chosen[-1].end) != (start, end):
            raise InvalidRequestError("the test's spans do not end there")
        return chosen

    def forward(self, hidden: Tensor, *, start: int, end: int, row_tokens: Any, position_runs: Any) -> Tensor:
        self.num_forwards += 1
        session = LocalSession(self, start, end, len(row_tokens), 1 << 20)
        try:
            return session.compute(hidden, row_tokens, position_runs)
        finally:
            session.close()

    def open_session(
        self,
        *,
        start: int,
        end: int,
        num_rows: int,
        max_length: int,
        prompts: Tensor | None = None,
        adaptation: object = None,
    ) -> LocalSession:
        assert prompts is None
        assert adaptation is None
        return LocalSession(self, start, end, num_rows, max_length)

    def close(self) -> None:
        self.is_closed = True


class LocalSession:
    """Tokens of each row so far; everything is computed anew at each step, which no cache can get wrong."""

    def __init__(self, chain: LocalChain, start: int, end: int, num_rows: int, max_length: int) -> None:
        self.chain = chain
        self.spans = chain.between(start, end)
        self.max_length = max_length
        self.columns: list[list[tuple[Tensor, int] | None]] = [[] for _ in range(num_rows)]
        """Per row and column a token's hidden state and position, None for what was never sent."""
        chain.open_sessions.add(self)

    def step(self, hidden: Tensor, request: StepRequest, *, num_wanted: int | None = None) -> Tensor:
        self.chain.num_steps += 1
        if self.chain.fail_next_step:
            self.chain.fail_next_step = False
            raise RemoteFailureError("the server broke")
        if any(len(row) < request.keep for row in self.columns):
            raise PetalsError("keep is more than there is")
        self.columns = [row[: request.keep] for row in self.columns]
        if request.row_order is not None:
            self.columns = [list(self.columns[row]) for row in request.row_order]
        return self.compute(hidden, request.row_tokens, request.position_runs)

    def compute(self, hidden: Tensor, row_tokens: Any, position_runs: Any) -> Tensor:
        width = max(row_tokens)
        outputs = []
        for index, (row, part) in enumerate(zip(self.columns, hidden.split(list(row_tokens)), strict=True)):
            length = sum(column is not None for column in row)
            if position_runs is None:
                positions = list(range(length, length + len(part)))
            else:
                positions = [first + i for first, count in position_runs[index] for i in range(count)]
            assert len(positions) == len(part)
            row += [None] * (width - len(part))
            row += list(zip(part.clone(), positions, strict=True))
            assert len(row) <= self.max_length
            known = [column for column in row if column is not None]
            if len(part) == 0:
                continue
            hidden = torch.stack([token for token, _ in known])[None]
            position_ids = torch.tensor([[position for _, position in known]])
            for span in self.spans:
                hidden = span(hidden, position_ids=position_ids)
            outputs.append(hidden[0, len(known) - len(part) :])
        return torch.cat(outputs).detach()

    def trace(self) -> tuple[()]:
        return ()

    def close(self) -> None:
        self.chain.open_sessions.discard(self)


class LocalSwarm:
    """A checkpoint, the model as Transformers loads it, and the same with remote blocks."""

    def __init__(self, folder: Path, mapping: str = "MODEL_FOR_CAUSAL_LM_MAPPING") -> None:
        import transformers

        self.folder = folder
        self.checkpoint = Checkpoint.open(folder)
        self.chain = LocalChain(self.checkpoint, (0, 1, 2, 3))
        self.model: Any = load_model(self.checkpoint, mapping=mapping, chain=self.chain)
        model_class = getattr(transformers, mapping)[type(self.checkpoint.config)]
        self.local: Any = apply_caps(model_class.from_pretrained(folder).eval())


@pytest.fixture(scope="session")
def make_swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LocalSwarm]]:
    """Make (once for each family) a tiny model of three blocks behind a local chain of two spans."""
    made: dict[tuple[str, str], LocalSwarm] = {}

    def make(family: str = "llama", mapping: str = "MODEL_FOR_CAUSAL_LM_MAPPING") -> LocalSwarm:
        if (family, mapping) not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family, mapping] = LocalSwarm(make_checkpoint(folder, family, num_blocks=3), mapping)
        return made[family, mapping]

    yield make
    assert not any(swarm.chain.open_sessions for swarm in made.values()), "a session was left open"


@pytest.fixture
def swarm(make_swarm: Callable[..., LocalSwarm]) -> LocalSwarm:
    """The tiny llama."""
    return make_swarm()


@pytest.fixture
def model(swarm: LocalSwarm) -> Any:
    """The tiny llama with remote blocks."""
    return swarm.model


@pytest.fixture
def local(swarm: LocalSwarm) -> Any:
    """The tiny llama as Transformers loads it."""
    return swarm.local
