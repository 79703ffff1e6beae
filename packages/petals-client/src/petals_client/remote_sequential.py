"""One module that stands for all blocks of a model and sends hidden states through the swarm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Tensor, nn

from petals_client.adaptation import Adaptation
from petals_client.autograd import RemoteCall, run_blocks
from petals_client.chain import Chain
from petals_client.hidden_states import StateCollector
from petals_client.inference_session import InferenceSession
from petals_client.lora import TunedAdapter
from petals_client.packing import Layout, pack, read_layout, read_position_runs, unpack
from petals_client.prefix import Prefix, prepend
from petals_core.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockCall:
    """What the base model's forward knows and its blocks are not told: 2D masks, positions, the session."""

    blocks: RemoteSequential
    session: InferenceSession | None
    valid: Tensor | None
    """Of the new columns only."""
    position_ids: Tensor | None
    collector: StateCollector | None = None
    """Gathers hidden states between blocks; None: nobody asks for them."""
    prompts: Tensor | None = None
    """Deep prompts [blocks, 1 or R, P, H] of the tokens themselves."""
    prefix: Prefix | None = None
    """Virtual tokens before every row, with deep prompts of their own."""
    num_wanted: int | None = None
    """Of how many columns, the last ones, anybody looks at what comes out; None: of all."""
    entrance: list[Tensor] | None = None
    """Where to put what comes in, instead of computing anything."""


_call: ContextVar[BlockCall | None] = ContextVar("petals block call", default=None)
_adapters: ContextVar[tuple[tuple[Chain, str | None], ...]] = ContextVar("petals adapters", default=())
_sessions: ContextVar[tuple[tuple[Chain, InferenceSession], ...]] = ContextVar("petals open sessions", default=())


class RemoteSequential(nn.Module):
    """Blocks ``start:end`` of a model, computed by servers; stands where Transformers keeps its ``ModuleList``.

    Transformers iterates over its blocks, or over ``blocks[:num_hidden_layers]``: both yield this module, once, while
    ``len`` is the true number. Other slices and indices give modules for those blocks, to be called on hidden states
    [R, T, H]. It has no parameters but those of an adapter that trains.
    """

    attention_type = block_type = "full_attention"
    """Some families choose a mask by this; none of their masks is used here."""

    def __init__(self, chain: Chain, *, returns_tuple: bool, start: int = 0, end: int | None = None) -> None:
        super().__init__()
        self.chain = chain
        self.start = start
        self.end = chain.num_blocks if end is None else end
        self._returns_tuple = returns_tuple
        self.active_adapter: str | None = None
        """An adapter that servers have loaded, which changes the blocks; None: none does."""
        self.tuned_adapter: TunedAdapter | None = None
        """Matrices of the client's own, which change the blocks and train."""

    # --- as a list ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[RemoteSequential]:
        yield self

    @overload
    def __getitem__(self, index: slice) -> RemoteSequential: ...
    @overload
    def __getitem__(self, index: int) -> RemoteSequential: ...
    def __getitem__(self, index: int | slice) -> RemoteSequential:
        """Return a module for some of the blocks; the slice of all is this module itself.

        Raises:
            IndexError: there is no such block, or the slice is empty or has a step.
        """
        if isinstance(index, slice):
            first, last, stride = index.indices(len(self))
            if stride != 1 or first >= last:
                raise IndexError("remote blocks can be sliced only without a step, and not to nothing")
        else:
            first = index + len(self) if index < 0 else index
            last = first + 1
            if not 0 <= first < len(self):
                raise IndexError(f"there are blocks 0 to {len(self) - 1}, not {index}")
        if (first, last) == (0, len(self)):
            return self
        part = RemoteSequential(self.chain, returns_tuple=False, start=self.start + first, end=self.start + last)
        part.active_adapter, part.tuned_adapter = self.active_adapter, self.tuned_adapter
        return part

    def extra_repr(self) -> str:
        return f"blocks {self.start}:{self.end}, computed by a swarm"

    # --- as a block ---------------------------------------------------------------------------------------------------

    def forward(
        self, hidden: Tensor, *args: Any, prompts: Tensor | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        """Run hidden states through the blocks.

        Called by its base model it takes mask, positions and session from there; what the model passes for its own
        kind of blocks (4D masks, rotary tables) is of no use to servers and ignored. Called directly all columns count
        as tokens, in the session that is open, if any. Then ``prompts`` [blocks, 1 or R, P, H] may be given: those of a
        block are added to the states of each row's first P tokens before it. Gradients flow to hidden states and
        prompts, outside of sessions.

        Raises:
            PetalsError: see ``InferenceSession.step`` and ``Chain.forward``.
        """
        if hidden.ndim != 3:
            raise InvalidRequestError(
                f"hidden states have the shape [rows, tokens, hidden size], not {list(hidden.shape)}"
            )
        call = _call.get()
        is_direct = call is None or call.blocks is not self
        if call is not None and not is_direct:
            _call.set(None)  # taken: a forward that fails later must leave nothing to the next one
        else:
            if kwargs.get("attention_mask") is not None:
                raise InvalidRequestError("remote blocks take no mask when called directly: pass rows without pads")
            call = BlockCall(blocks=self, session=self.open_session, valid=None, position_ids=None, prompts=prompts)
        if call.collector is not None:
            call.collector.states[0] = hidden
        if call.entrance is not None:
            call.entrance.append(hidden)
            output = hidden
        else:
            output = self._run(hidden, call)
        # Two elements, because some families unpack them (bamba) where others take the first (bloom, falcon).
        return (output, None) if self._returns_tuple and not is_direct else output

    def _run(self, hidden: Tensor, call: BlockCall) -> Tensor:
        if call.session is not None:
            if hidden.requires_grad and torch.is_grad_enabled():
                output: Tensor = _NoGradient.apply(hidden, lambda hidden: self._step(hidden, call))
                return output
            return self._step(hidden, call)
        num_rows, width, _ = hidden.shape
        layout = read_layout(num_rows, width, call.valid)
        runs = None if call.position_ids is None else read_position_runs(call.position_ids, layout, [0] * num_rows)
        packed = pack(hidden, layout).cpu()
        prompts = None if call.prompts is None else self._check_prompts(call.prompts, layout).to(packed)
        row_tokens = layout.row_tokens
        places: Tensor | None = None
        if call.prefix is not None:
            prefixed = prepend(call.prefix.states, packed, row_tokens, runs)
            packed, row_tokens, runs, places = (
                prefixed.packed,
                prefixed.row_tokens,
                prefixed.position_runs,
                prefixed.places,
            )
            prompts = None if call.prefix.prompts is None else call.prefix.prompts.to(packed)

        def restore(packed: Tensor) -> Tensor:
            """What the caller sees of packed states."""
            tokens = packed if places is None else packed.index_select(0, places)
            return unpack(tokens.to(hidden.device), layout)

        values, adaptation = self._adapt()
        bounds = (self.start, self.end) if call.collector is None else call.collector.bounds(self.start, self.end)
        for start, end in pairwise(bounds):
            if layout.num_tokens:
                part = None if prompts is None else prompts[start - self.start : end - self.start]
                packed = run_blocks(
                    packed,
                    part,
                    None
                    if values is None or self.tuned_adapter is None
                    else values[self.tuned_adapter.layout.place(start, end)],
                    RemoteCall(
                        chain=self.chain,
                        start=start,
                        end=end,
                        row_tokens=row_tokens,
                        position_runs=runs,
                        adaptation=adaptation,
                    ),
                )
            if call.collector is not None:
                call.collector.states[end] = restore(packed)
        return restore(packed)

    def _adapt(self) -> tuple[Tensor | None, Adaptation | None]:
        """What changes the blocks now, and the values [V] to which gradients flow."""
        adapter = self.active_adapter
        for chain, name in _adapters.get():
            if chain is self.chain:
                adapter = name
        if self.tuned_adapter is None:
            return None, None if adapter is None else Adaptation(adapter=adapter)
        values = self.tuned_adapter.join()
        return values, Adaptation(adapter=adapter, tuned=self.tuned_adapter.snapshot(values))

    @contextmanager
    def use_adapter(self, name: str | None) -> Iterator[None]:
        """Let calls inside use an adapter that servers have, or none; this thread (and asyncio task) only."""
        token = _adapters.set((*_adapters.get(), (self.chain, name)))
        try:
            yield
        finally:
            _adapters.reset(token)

    def _step(self, hidden: Tensor, call: BlockCall) -> Tensor:
        assert call.session is not None
        return call.session.step(
            hidden,
            valid=call.valid,
            position_ids=call.position_ids,
            collector=call.collector,
            prefix=call.prefix,
            num_wanted=call.num_wanted,
        )

    def _check_prompts(self, prompts: Tensor, layout: Layout) -> Tensor:
        shape = tuple(prompts.shape)
        if len(shape) != 4 or shape[0] != len(self) or shape[1] not in (1, layout.num_rows):
            raise InvalidRequestError(
                f"deep prompts of shape {list(shape)} do not fit {len(self)} blocks and {layout.num_rows} rows: "
                "they are [blocks, 1 or rows, tokens, width]"
            )
        if not 0 < shape[2] <= min(layout.row_tokens):
            raise InvalidRequestError(
                f"deep prompts of {shape[2]} tokens need rows of as many tokens, and one has {min(layout.row_tokens)}"
            )
        return prompts

    # --- sessions -----------------------------------------------------------------------------------------------------

    @property
    def open_session(self) -> InferenceSession | None:
        """The innermost session on these blocks that was opened around the caller with ``use_session``."""
        for chain, session in reversed(_sessions.get()):
            if chain is self.chain and (session.start, session.end) == (self.start, self.end):
                return session
        return None

    def new_session(self, max_length: int) -> InferenceSession:
        """Make a session that is not open around anything; nothing travels before its first step."""
        return InferenceSession(
            self.chain, start=self.start, end=self.end, max_length=max_length, adapt=lambda: self._adapt()[1]
        )

    @contextmanager
    def use_session(self, session: InferenceSession) -> Iterator[InferenceSession]:
        """Let calls inside use a session; this thread (and asyncio task) only. Does not close it."""
        token = _sessions.set((*_sessions.get(), (self.chain, session)))
        try:
            yield session
        finally:
            _sessions.reset(token)

    @contextmanager
    def inference_session(self, *, max_length: int) -> Iterator[InferenceSession]:
        """Open a session for the calls inside, and close it behind them."""
        with self.new_session(max_length) as session, self.use_session(session):
            yield session

    # --- copies -------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteSequential:
        twin = RemoteSequential(self.chain, returns_tuple=self._returns_tuple, start=self.start, end=self.end)
        twin.active_adapter = self.active_adapter
        twin.tuned_adapter = copy.deepcopy(self.tuned_adapter, memo)
        return twin


@contextmanager
def entered(call: BlockCall) -> Iterator[None]:
    """Tell the blocks of a base model what its forward knows, while that runs."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


class _NoGradient(torch.autograd.Function):
    """A step of a session, whose backward says why it can't be done."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        return run(hidden.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise InvalidRequestError(
            "gradients do not flow through sessions, whose caches are the servers': call the model outside of the "
            "session with the whole sequence, or run the forward under torch.no_grad()"
        )
