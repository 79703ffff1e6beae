"""Position ids outside of a model's tables, which no server may look up."""

from pathlib import Path

import pytest
import torch

from petals_core.errors import SessionLengthError
from petals_core.testing.factories import make_checkpoint
from petals_core.testing.network import run_clean
from petals_server.columns import ColumnLedger
from petals_server.positions import check_positions
from petals_server.testing import random_states, served

NUM_POSITIONS = 512


def test_a_row_may_be_shorter_than_its_columns() -> None:
    ledger = ColumnLedger(2)
    assert ledger.count_within(0) == [0, 0]
    ledger.append((3, 1))
    ledger.append((1, 3))
    assert (ledger.num_columns, ledger.count_within(6), ledger.count_within(3)) == (6, [4, 4], [3, 1])
    check_positions((1, 1), None, 5, row_lengths=[4, 4])
    check_positions((2, 4), None, 5, row_lengths=[3, 1])
    check_positions((9, 9), None, None, row_lengths=[4, 4])
    with pytest.raises(SessionLengthError, match="has 5 positions and the request needs 6"):
        check_positions((2, 1), None, 5, row_lengths=[4, 4])
    with pytest.raises(SessionLengthError):
        check_positions((1, 1), (((4, 1),), ((5, 1),)), 5, row_lengths=[0, 0])


def test_a_model_with_a_table_refuses_what_is_outside_of_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gptj", num_blocks=2)

    async def run() -> None:
        async with served(folder) as client:
            assert client.server.model.max_positions == NUM_POSITIONS
            session = await client.open(max_length=992)
            (states,) = random_states(1, 1)
            with pytest.raises(SessionLengthError, match="shorten the text"):
                await session.step([states], position_runs=(((NUM_POSITIONS, 1),),))
            with pytest.raises(SessionLengthError, match="shorten the text"):
                await session.step(random_states(1, NUM_POSITIONS + 1).unbind())
            with pytest.raises(SessionLengthError, match="shorten the text"):
                await client.forward([states], position_runs=(((NUM_POSITIONS, 1),),))
            (last,) = await session.step([states], position_runs=(((NUM_POSITIONS - 1, 1),),))
            assert torch.isfinite(last).all()

    run_clean(run())


def test_a_model_without_a_table_takes_any_position(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            assert client.server.model.max_positions is None

    run_clean(run())
