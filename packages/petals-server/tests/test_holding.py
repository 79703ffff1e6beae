import shutil
from pathlib import Path
from typing import cast

import pytest

from petals_core.addresses import Address
from petals_core.errors import CheckpointError, DrainingError, OverloadedError
from petals_core.identity import Identity
from petals_core.net.dialer import Dialer
from petals_core.net.stream import Stream
from petals_core.testing.network import run_clean
from petals_server.comfort.ledger import ServedLedger
from petals_server.contribution.book import ReceiptBook
from petals_server.contribution.desk import ContributionDesk
from petals_server.holding import Holding
from petals_server.testing import config_for

NO_STREAM = cast(Stream, None)


def test_blocks_are_given_up_for_others_and_an_error_leaves_a_way_back(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    aside = tmp_path / "aside"

    async def run() -> None:
        identity, ledger = Identity.ephemeral(), ServedLedger()
        desk = ContributionDesk(identity, ledger, ReceiptBook(None), prefers=False)
        holding = Holding(config_for(folder), dialer=Dialer(identity=identity), ledger=ledger, desk=desk)
        try:
            await holding.open(Address("127.0.0.1", 1), None)
            with pytest.raises(OverloadedError, match="still loading"):
                await holding.serve(NO_STREAM)
            await holding.load(0, 2)
            assert holding.is_online
            holding.leave()
            assert not holding.is_online
            (folder / "model.safetensors").rename(aside)
            for _ in range(2):
                with pytest.raises(CheckpointError):
                    await holding.replace(2, 4)
                with pytest.raises(DrainingError, match="moving to other blocks"):
                    await holding.serve(NO_STREAM)
            aside.rename(folder / "model.safetensors")
            await holding.replace(0, 2)
            assert holding.is_online
            await holding.pause()
            assert not holding.is_online
            await holding.replace(1, 4)
            assert not holding.is_online
            holding.resume()
            assert holding.is_online
            assert holding.span == (1, 4) == (holding.handler.model.span.start, holding.handler.model.span.end)
        finally:
            await holding.close()

    run_clean(run())
