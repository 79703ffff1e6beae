"""Blocks as modules: parts of a model in any order, on hidden states of one's own, with and without a session."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from petals_core.errors import InvalidRequestError, SessionLengthError


@pytest.fixture(scope="module", params=["llama", "bloom", "demo"])
def pair(request: pytest.FixtureRequest, pairs: Any) -> Any:
    return pairs(request.param)


@pytest.fixture(scope="module")
def blocks(pair: Any) -> Any:
    return pair.model.remote_blocks


def states(pair: Any, rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Hidden states of one's own."""
    return torch.randn(rows, width, pair.local.config.hidden_size, generator=torch.Generator().manual_seed(seed))


def run_locally(pair: Any, order: list[int], hidden: torch.Tensor) -> torch.Tensor:
    """The local model with its blocks in another order and nothing around them."""
    base = copy.deepcopy(pair.local.base_model)
    name = "h" if hasattr(base, "h") else "layers"
    path = list(getattr(base, name))
    setattr(base, name, torch.nn.ModuleList([path[index] for index in order]))
    base.config.num_hidden_layers = len(order)
    for norm in ("norm", "ln_f", "word_embeddings_layernorm"):
        if hasattr(base, norm):
            setattr(base, norm, torch.nn.Identity())
    with torch.no_grad():
        return base(inputs_embeds=hidden, use_cache=False).last_hidden_state


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 1e-5 * max(1.0, float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= limit


def test_where_blocks_are(pair: Any, blocks: Any) -> None:
    base = pair.model.base_model
    assert (base.h if hasattr(base, "h") else base.layers) is blocks
    assert len(blocks) == pair.local.config.num_hidden_layers
    assert len(blocks[1:3]) == 2
    assert (blocks[-1].start, blocks[2:][1].start) == (len(blocks) - 1, 3)


@pytest.mark.parametrize("order", [[2], [0, 1, 2, 3, 4], [3, 1, 1, 5, 0]])
def test_any_order(pair: Any, blocks: Any, order: list[int]) -> None:
    hidden = states(pair, 2, 5)
    expected = run_locally(pair, order, hidden)
    for index in order:
        hidden = blocks[index](hidden)
    assert_close(hidden, expected)


def test_parts_that_lie_across_servers(pair: Any, blocks: Any) -> None:
    hidden = states(pair, 2, 5)
    assert_close(blocks[:2](hidden), run_locally(pair, [0, 1], hidden))
    assert_close(blocks[3:5](hidden), run_locally(pair, [3, 4], hidden))
    assert_close(blocks(hidden), run_locally(pair, list(range(len(blocks))), hidden))


def test_steps_of_a_session(pair: Any, blocks: Any) -> None:
    hidden, other = states(pair, 2, 6), states(pair, 2, 3, seed=1)
    expected = run_locally(pair, [2, 3, 4], hidden)
    with blocks[2:5].inference_session(max_length=8) as session:
        assert_close(torch.cat([session.step(hidden[:, :4]), session.step(hidden[:, 4:])], dim=1), expected)
        assert session.position == 6
        session.truncate(3)
        assert session.position == 3
        again = session.step(other)
        assert_close(again, run_locally(pair, [2, 3, 4], torch.cat([hidden[:, :3], other], dim=1))[:, 3:])
        with pytest.raises(SessionLengthError, match="6 cached and 3 new tokens do not fit"):
            session.step(other)
        session.position = 0
        assert_close(session.step(hidden), expected)
    pair.swarm.wait_for_sessions(0)
    with pytest.raises(InvalidRequestError, match="session is closed"):
        session.step(hidden)


def test_states_that_are_not_wanted_do_not_come_back(pair: Any, blocks: Any) -> None:
    """Of a prompt in parts; the rows begin at different columns, and what comes later sees all of it."""
    hidden, more = states(pair, 2, 70), states(pair, 2, 2, seed=1)
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[1, :5] = False
    rows = [hidden[:1], hidden[1:, 5:]]
    order = list(range(len(blocks)))
    with blocks.inference_session(max_length=72) as session:
        actual = session.step(hidden, valid=valid, num_wanted=3)
        following = session.step(more)
    assert actual[:, :48].count_nonzero() == 0, "three parts"
    assert_close(actual[:, -3:], torch.cat([run_locally(pair, order, row)[:, -3:] for row in rows]))
    wholes = [torch.cat([row, more[[index]]], dim=1) for index, row in enumerate(rows)]
    assert_close(following, torch.cat([run_locally(pair, order, whole)[:, -2:] for whole in wholes]))


def test_a_session_around_calls(pair: Any, blocks: Any) -> None:
    """Calls of the same blocks go on in the open session; other blocks have nothing to do with it."""
    part, hidden = blocks[1:4], states(pair, 1, 5)
    with part.inference_session(max_length=5) as session:
        first = part(hidden[:, :2])
        assert blocks[0](hidden[:, :3]).shape == (1, 3, hidden.shape[2])
        rest = blocks[1:4](hidden[:, 2:])
        assert session.position == 5
    assert_close(torch.cat([first, rest], dim=1), run_locally(pair, [1, 2, 3], hidden))


def test_rows_in_another_order(pair: Any, blocks: Any) -> None:
    """As beams need it: rows go on from what other rows were."""
    hidden, more = states(pair, 3, 4), states(pair, 3, 2, seed=1)
    with blocks[:4].inference_session(max_length=8) as session:
        session.step(hidden)
        session.reorder([2, 0, 0])
        session.reorder([1, 0, 2])
        actual = session.step(more)
    whole = torch.cat([hidden[[0, 2, 0]], more], dim=1)
    assert_close(actual, run_locally(pair, [0, 1, 2, 3], whole)[:, 4:])


def test_sessions_side_by_side(pair: Any, blocks: Any) -> None:
    hidden = states(pair, 1, 4)
    with blocks[:3].inference_session(max_length=4) as one, blocks[3:6].inference_session(max_length=4) as two:
        parts = [two.step(one.step(hidden[:, [column]])) for column in range(4)]
    assert_close(torch.cat(parts, dim=1), run_locally(pair, [0, 1, 2, 3, 4, 5], hidden))


def test_what_is_wrong(pair: Any, blocks: Any) -> None:
    hidden = states(pair, 1, 3)
    for index in (slice(2, 1), slice(None, None, 2), len(blocks), -len(blocks) - 1):
        with pytest.raises(IndexError):
            blocks[index]
    with pytest.raises(InvalidRequestError, match="take no mask when called directly"):
        blocks[0](hidden, attention_mask=torch.ones(1, 3))
    with pytest.raises(InvalidRequestError, match=r"hidden states of shape \[3, .* the model ask for"):
        blocks[0](hidden[..., :-1])
    with blocks[:2].inference_session(max_length=3) as session:
        for run in (blocks[0], session.step):
            with pytest.raises(InvalidRequestError, match=r"have the shape \[rows, tokens, hidden size\], not \[3,"):
                run(hidden[0])
