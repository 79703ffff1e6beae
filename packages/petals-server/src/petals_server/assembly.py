"""Puts together what answers requests, once blocks are loaded. Importing it imports torch and Transformers."""

from __future__ import annotations

import logging

from petals_core.net.dialer import Dialer
from petals_server.comfort.ledger import ServedLedger
from petals_server.config import ServerConfig
from petals_server.contribution.desk import ContributionDesk
from petals_server.engine import Engine
from petals_server.handlers import RequestHandler, ServerFacts
from petals_server.loading import ServedModel
from petals_server.ring.next_hops import NextHops
from petals_server.ring.table import RingTable
from petals_server.scheduling.pace import Pace
from petals_server.sessions import SessionTable
from petals_server.speed import Speed

log = logging.getLogger(__name__)


def assemble_handler(
    model: ServedModel,
    *,
    config: ServerConfig,
    engine: Engine,
    dialer: Dialer,
    facts: ServerFacts,
    ledger: ServedLedger,
    desk: ContributionDesk,
    is_local: bool,
) -> RequestHandler:
    """A handler for a model that was just loaded; the engine adopts its pages and pace.

    ``is_local`` tells whether the server is reached by an address of a private network.
    """
    log.info(
        "computing with %d thread(s) for one token (%.0f tokens/s), %d for many (%.0f tokens/s); "
        "attention cache of %d tokens",
        model.threads.decode,
        model.threads.decode_tokens_per_s,
        model.threads.bulk,
        model.threads.bulk_tokens_per_s,
        model.cache_tokens,
    )
    max_turn_tokens = config.limits.max_turn_tokens or model.max_turn_tokens
    engine.adopt(
        model.pages,
        Pace(
            decode_tokens_per_s=model.threads.decode_tokens_per_s,
            bulk_tokens_per_s=model.threads.bulk_tokens_per_s,
            max_turn_tokens=max_turn_tokens,
        ),
    )
    return RequestHandler(
        model=model,
        engine=engine,
        sessions=SessionTable(
            cache_tokens=model.cache_tokens,
            limits=config.limits,
            state_tokens=model.state_tokens,
            page_tokens=model.pages.page_tokens,
            max_row_tokens=model.pages.max_row_tokens(max_turn_tokens),
        ),
        ring=RingTable(NextHops(dialer, fingerprint=model.fingerprint, is_local=is_local), limits=config.limits),
        limits=config.limits,
        facts=facts,
        served=ledger,
        desk=desk,
    )


def measured_speed(model: ServedModel) -> Speed:
    """What was measured when the model was loaded."""
    return Speed(
        decode_tokens_per_s=model.threads.decode_tokens_per_s, forward_tokens_per_s=model.threads.bulk_tokens_per_s
    )
