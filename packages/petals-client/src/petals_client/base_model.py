"""What a distributed model's base class does around its blocks: it tells them what no block of Transformers is told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from petals_client.hidden_states import StateCollector
from petals_client.inference_session import InferenceSession
from petals_client.remote_sequential import BlockCall, RemoteSequential, entered
from petals_client.tuning import add_prompts
from petals_core.errors import InvalidRequestError
from petals_core.models.transformers_forward import (
    BaseCall,
    CountingCache,
    EmptyCache,
    fill_hidden_states,
    read_base_call,
    select_states,
)
from petals_core.models.transformers_structure import takes_position_ids

BLOCKS_ATTRIBUTE = "_petals_blocks"
"""Where a base model, and the part of it that iterates over the blocks, note the path of these from there."""


@dataclass(slots=True, eq=False)
class Generation:
    """A call of ``generate`` outside of a session, and the sessions that were opened for it."""

    blocks: RemoteSequential
    max_length: int = 1
    sessions: list[InferenceSession] = field(default_factory=list)

    def new_cache(self) -> CountingCache:
        """The cache of another session, which ends with the call."""
        session = self.blocks.new_session(self.max_length)
        self.sessions.append(session)
        return session.cache

    @contextmanager
    def running(self) -> Iterator[None]:
        """Be the call that forwards inside belong to."""
        token = _generation.set(self)
        try:
            yield
        finally:
            _generation.reset(token)
            for session in self.sessions:
                session.close()


_num_wanted: ContextVar[int | None] = ContextVar("petals wanted columns", default=None)


@contextmanager
def looking_at_last(num_columns: int | None) -> Iterator[None]:
    """While a head runs its base model: it looks at the states of so many columns, the last ones; None: at all."""
    token = _num_wanted.set(num_columns)
    try:
        yield
    finally:
        _num_wanted.reset(token)


_generation: ContextVar[Generation | None] = ContextVar("petals generation", default=None)


def current_generation() -> Generation | None:
    """The call of ``generate`` that is running around the caller."""
    return _generation.get()


def _generation_on(blocks: RemoteSequential) -> Generation | None:
    generation = _generation.get()
    return generation if generation is not None and generation.blocks.chain is blocks.chain else None


def once_for_each(make: Callable[[type[Any]], type[Any]]) -> Callable[[type[Any]], type[Any]]:
    """Make one subclass for each class and no more."""
    made: dict[type[Any], type[Any]] = {}

    @functools.wraps(make)
    def get(model_class: type[Any]) -> type[Any]:
        if model_class not in made:
            made[model_class] = make(model_class)
        return made[model_class]

    return get


@once_for_each
def remote_base_class(base_class: type[Any]) -> type[Any]:
    """A subclass under the same name whose forward tells its remote blocks what they have to know."""
    original = base_class.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        blocks: RemoteSequential = self.get_submodule(getattr(self, BLOCKS_ATTRIBUTE))
        call = read_base_call(self, original, args, kwargs)
        session = _choose_session(blocks, call)
        block_call = _read_block_call(blocks, session, call, counts_positions=takes_position_ids(original))
        block_call = add_prompts(self, original, call, block_call)
        past = 0 if session is None else session.position
        with entered(block_call):
            output = original(self, **call.arguments)
        if session is not None:
            session.note_tokens(call.arguments.get("input_ids"), past)
        collector = block_call.collector
        if collector is None:
            return output
        return fill_hidden_states(
            output, collector.states, collector.wanted, len(blocks), as_tuple=call.is_tuple_wanted
        )

    body = {"forward": forward, "__module__": base_class.__module__, "__qualname__": base_class.__qualname__}
    return type(base_class.__name__, (base_class,), body)


def _choose_session(blocks: RemoteSequential, call: BaseCall) -> InferenceSession | None:
    """Find the session that a forward belongs to, and give the model the cache that stands for it."""
    cache = call.past_key_values
    session: InferenceSession | None = None
    if cache is None:
        generation = _generation_on(blocks)
        if generation is not None:
            # A second context beside the first, such as that of classifier-free guidance.
            if call.use_cache:
                session = session_of(generation.new_cache(), blocks)
        elif call.arguments.get("use_cache") is not False:
            session = blocks.open_session
    else:
        session = session_of(cache, blocks)
    if session is not None:
        call.arguments["past_key_values"] = session.cache
        call.arguments["use_cache"] = True
    elif call.use_cache:
        call.arguments["past_key_values"] = EmptyCache()
    return session


def session_of(cache: object, blocks: RemoteSequential) -> InferenceSession:
    """The session that a cache stands for.

    Raises:
        InvalidRequestError: it stands for none, or for one of other blocks.
    """
    if isinstance(cache, EmptyCache):
        raise InvalidRequestError(
            "this past_key_values is of a forward that kept nothing: open a session first, "
            "with model.inference_session(max_length=...)"
        )
    if not isinstance(cache, CountingCache) or not isinstance(cache.session, InferenceSession):
        raise InvalidRequestError(
            f"past_key_values of type {type(cache).__name__} can't be used with remote blocks, which keep their caches "
            "themselves: open a session with model.inference_session(max_length=...) and pass session.cache"
        )
    if not cache.session.is_of(blocks.chain, blocks.start, blocks.end):
        raise InvalidRequestError("this past_key_values belongs to another model's session")
    return cache.session


def _read_block_call(
    blocks: RemoteSequential, session: InferenceSession | None, call: BaseCall, *, counts_positions: bool
) -> BlockCall:
    past = 0 if session is None else session.position
    valid: Tensor | None = None
    if call.attention_mask is not None:
        mask = call.attention_mask
        if tuple(mask.shape) != (call.num_rows, past + call.width):
            raise InvalidRequestError(
                f"an attention mask of shape {list(mask.shape)} does not fit {call.num_rows} rows of "
                f"{past} cached and {call.width} new tokens"
            )
        if session is not None and past and not session.has_mask(mask[:, :past]):
            raise InvalidRequestError("the attention mask changed for tokens that the session has already cached")
        valid = mask[:, past:]
    position_ids = call.position_ids
    if not counts_positions:
        position_ids = None
    elif position_ids is None and (valid is not None or (session is not None and session.has_pads)):
        # Transformers' own default: columns are counted, pads included.
        position_ids = torch.arange(past, past + call.width)[None]
    collector = None
    if call.output_hidden_states is not False:
        collector = StateCollector(wanted=select_states(call.output_hidden_states, len(blocks)))
    return BlockCall(
        blocks=blocks,
        session=session,
        valid=valid,
        position_ids=position_ids,
        collector=collector,
        num_wanted=_num_wanted.get() if collector is None else None,
    )
