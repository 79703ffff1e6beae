"""What a distributed model adds to its Transformers class: sessions, and ``generate`` within them."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from petals_client.base_model import (
    BLOCKS_ATTRIBUTE,
    Generation,
    current_generation,
    looking_at_last,
    once_for_each,
    session_of,
)
from petals_client.inference_session import DRAFT_COLUMNS, InferenceSession
from petals_client.remote_sequential import RemoteSequential
from petals_client.routing.explanation import Route
from petals_client.speculation.candidates import CandidateDrafter
from petals_client.speculation.decoding import decode
from petals_client.speculation.draft_length import MAX_DRAFTS, DraftLength
from petals_client.speculation.draft_model import DraftModel, draft_processors, load_draft_model
from petals_client.speculation.drafts import Drafter
from petals_client.speculation.speculator import PRIORS, Speculator
from petals_client.tuned_model import TunableModel
from petals_core.errors import InvalidRequestError, SessionLengthError
from petals_core.models.transformers_forward import CountingCache
from petals_core.models.transformers_private import DecodingCall, GenerationEntry, skip_cached

SPECULATION_MODES = ("auto", "lookup", "draft", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Speculation:
    """What a call of ``generate`` may draft with."""

    mode: str
    draft_model: Any
    num_drafts: int | None


_speculation: ContextVar[_Speculation | None] = ContextVar("petals speculation", default=None)


class DistributedModel(TunableModel):
    """Mixin before a model class of Transformers whose blocks are remote."""

    base_model: Any

    @property
    def remote_blocks(self) -> RemoteSequential:
        """The module that stands for all blocks."""
        base = self.base_model
        blocks = base.get_submodule(getattr(base, BLOCKS_ATTRIBUTE))
        assert isinstance(blocks, RemoteSequential)
        return blocks

    @contextmanager
    def inference_session(self, *, max_length: int) -> Iterator[InferenceSession]:
        """Open a session that keeps its attention cache over the calls of ``generate`` and forward inside.

        Inside, new tokens alone are passed, and ``generate()`` without tokens goes on where the last one ended.
        """
        with self.remote_blocks.inference_session(max_length=max_length) as session:
            yield session

    def use_session(self, session: InferenceSession) -> Any:
        """Context manager: let the calls inside use a session that was opened before."""
        return self.remote_blocks.use_session(session)

    def explain_route(self) -> Route:
        """The chain of servers that a new session would use now, what each edge costs, and why other servers lost.

        ``print`` it, or take it apart: ``edges``, ``alternatives``, ``total_s``.

        Raises:
            MissingBlocksError: some blocks are held by no live server.
            NoPeersError: no peer of the swarm answers.
        """
        blocks = self.remote_blocks
        return blocks.chain.explain_route(blocks.start, blocks.end)

    def close(self) -> None:
        """Let go of all connections; the model can't be used afterwards."""
        self.remote_blocks.chain.close()


class DistributedGeneration(DistributedModel, GenerationEntry):
    """The same for a class that generates."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        session: InferenceSession | None = None,
        speculation: str = "auto",
        draft_model: Any = None,
        num_drafts: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as Transformers does, with all its options.

        Outside of a session one is opened for the call. In a session (the one that is open, or ``session``) ``inputs``
        are the tokens that are new, None to go on from the last one; what comes back begins with them, not with what
        was said before. With ``past_key_values=session.cache`` the whole sequence goes in and comes back.

        Args:
            speculation: where greedy decoding and sampling take drafts from, so that a trip brings several tokens:
                ``"lookup"`` in the text itself, ``"draft"`` from ``draft_model``, ``"auto"`` from whatever promises
                most, ``"off"`` from nowhere. Tokens are those without drafts; those sampled with a draft model have
                the same distribution, and differ from run to run unless ``num_drafts`` is given.
            draft_model: a small model with the same tokenizer on this machine, or its name or folder.
            num_drafts: how many tokens to draft whenever that is possible; None: as many as pay, which may be none.

        Raises:
            PetalsError: see ``InferenceSession.step``; Transformers' own errors come as they are.
        """
        if kwargs.get("cache_implementation") == "paged":
            self.generate_batch()
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        config = args[0] if args else kwargs.get("generation_config") or getattr(self, "generation_config")  # noqa: B009
        token = _speculation.set(_check_speculation(speculation, draft_model, num_drafts, config, kwargs))
        try:
            return self._generate(session, inputs, args, kwargs)
        finally:
            _speculation.reset(token)

    def _generate(
        self, session: InferenceSession | None, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        blocks = self.remote_blocks
        cache = kwargs.get("past_key_values")
        if cache is not None:
            session = session_of(cache, blocks)
            return self._generate_whole(session, inputs, args, kwargs)
        session = session if session is not None else blocks.open_session
        if session is not None:
            return self._generate_on(session, inputs, args, kwargs)
        with Generation(blocks).running():
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _generate_on(
        self, session: InferenceSession, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Append new tokens to a session and go on."""
        if kwargs.get("inputs_embeds") is not None:
            raise InvalidRequestError("a session is continued with token ids: pass input_ids, not inputs_embeds")
        previous = session.output_ids
        if previous is None and session.position:
            raise InvalidRequestError(
                "the session holds embeddings whose tokens are not known: go on with the model's forward, "
                "or pass the whole sequence with past_key_values=session.cache"
            )
        if previous is None and inputs is None:
            raise InvalidRequestError("the session is empty and has nothing to go on from: pass a prompt")
        if previous is None:
            whole = inputs
        else:
            if inputs is not None and inputs.shape[0] != previous.shape[0]:
                raise InvalidRequestError(
                    f"the session has {previous.shape[0]} rows and can't go on with {inputs.shape[0]}: open another one"
                )
            previous = previous.to(self.base_model.device)
            whole = previous if inputs is None else torch.cat([previous, inputs.to(previous.device)], dim=1)
            kwargs["attention_mask"] = self._whole_mask(session, previous, inputs, kwargs.get("attention_mask"))
        assert whole is not None
        num_previous = 0 if previous is None else previous.shape[1]
        result = self._generate_whole(session, whole, args, {**kwargs, "past_key_values": session.cache})
        if isinstance(result, Tensor):
            return result[:, num_previous:]
        result.sequences = result.sequences[:, num_previous:]
        return result

    def _whole_mask(
        self, session: InferenceSession, previous: Tensor, inputs: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """The mask [R, previous and new] for a session's tokens and what is said of the new ones."""
        num_new = 0 if inputs is None else inputs.shape[1]
        if mask is not None and mask.shape[1] == previous.shape[1] + num_new:
            return mask
        before = session.output_mask
        before = torch.ones_like(previous) if before is None else before.to(previous)
        if inputs is None:
            return before
        if mask is None:
            mask = torch.ones_like(inputs)
            pad = getattr(self, "generation_config").pad_token_id  # noqa: B009  # of the class that this is mixed into
            ends = getattr(self, "generation_config").eos_token_id  # noqa: B009
            if pad is not None and pad not in (ends if isinstance(ends, list) else [ends]):
                mask = (inputs != pad).long()  # as Transformers infers it for a first prompt
        if mask.shape != inputs.shape:
            raise InvalidRequestError(
                f"an attention mask of shape {list(mask.shape)} fits neither the new tokens {list(inputs.shape)} "
                "nor all tokens of the session"
            )
        return torch.cat([before, mask.to(before)], dim=1)

    def _generate_whole(
        self, session: InferenceSession, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``generate`` on whole sequences whose first columns a session has cached."""
        config = args[0] if args else kwargs.get("generation_config") or getattr(self, "generation_config")  # noqa: B009
        if (kwargs.get("num_beams") or config.num_beams or 1) > 1:
            raise InvalidRequestError(
                "beam search ends with other rows than it began with and can't be part of a session: "
                "call generate outside of the session"
            )
        if kwargs.get("use_cache") is False:
            raise InvalidRequestError("use_cache=False contradicts the open session: leave it out")
        session.recover()
        if inputs is not None:
            mask = kwargs.get("attention_mask")
            if mask is None or mask.shape[1] == inputs.shape[1]:
                session.keep_common_prefix(inputs)
        with session.generating():
            result = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        sequences = result if isinstance(result, Tensor) else result.sequences
        session.set_output(sequences)
        return result

    def _new_generation_cache(self, max_length: int) -> CountingCache:
        generation = current_generation()
        assert generation is not None
        generation.max_length = max_length
        return generation.new_cache()

    def _check_generation_cache(self, cache: CountingCache, max_length: int, num_drafts: int) -> None:
        assert isinstance(cache.session, InferenceSession)
        limit = cache.session.max_length
        if max_length > limit or max_length + num_drafts > limit + DRAFT_COLUMNS:
            raise SessionLengthError(
                f"up to {max_length} tokens may have to be cached and the session holds {limit}: "
                "lower max_new_tokens, or open it with a larger max_length"
            )

    def _wants_drafts(self) -> bool:
        speculation = _speculation.get()
        return speculation is not None and speculation.mode != "off"

    def _decode_with_drafts(self, call: DecodingCall) -> Any:
        drafter: Drafter = CandidateDrafter(call) if call.assistants is not None else self._new_speculator(call)
        return decode(call, drafter)

    def _new_speculator(self, call: DecodingCall) -> Speculator:
        wanted = _speculation.get()
        assert wanted is not None
        mask = call.model_kwargs.get("attention_mask")
        model: DraftModel | None = None
        if wanted.mode != "lookup" and wanted.draft_model is not None and call.tokens.shape[1]:
            source = wanted.draft_model
            config: Any = self.base_model.config
            model = DraftModel(
                load_draft_model(str(source)) if isinstance(source, (str, os.PathLike)) else source,
                vocabulary=config.get_text_config().vocab_size,
                mask=mask,
                processors=draft_processors(call.processors),
                do_sample=bool(call.config.do_sample),
            )
        return Speculator(
            self._draft_length,
            mask=mask,
            uses_lookup=wanted.mode != "draft",
            model=model,
            num_drafts=wanted.num_drafts,
        )

    @property
    def _draft_length(self) -> DraftLength:
        """What this model's trips have taught."""
        known: DraftLength | None = self.__dict__.get("_petals_draft_length")
        if known is None:
            known = self.__dict__["_petals_draft_length"] = DraftLength(priors=dict(PRIORS))
        return known

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: Transformers' own continuous batching manages pages of a local cache.

        Raises:
            InvalidRequestError: always.
        """
        raise InvalidRequestError(
            "paged generation manages a local cache: call generate() without cache_implementation; "
            "the servers batch by themselves"
        )


def _check_speculation(
    mode: str, draft_model: Any, num_drafts: int | None, config: Any, kwargs: dict[str, Any]
) -> _Speculation:
    """What may be drafted with; raises ``InvalidRequestError`` if that contradicts itself or the other options."""
    if mode not in SPECULATION_MODES:
        raise InvalidRequestError(f"speculation {mode!r} is none of {', '.join(SPECULATION_MODES)}")
    if mode == "draft" and draft_model is None:
        raise InvalidRequestError('speculation="draft" needs a small model with the same tokenizer: pass draft_model=')
    if num_drafts is not None and not 0 <= num_drafts <= MAX_DRAFTS:
        raise InvalidRequestError(f"num_drafts is 0 to {MAX_DRAFTS}, or None to draft as many tokens as pay")
    if mode in ("lookup", "draft"):
        others = {
            "beam search": (kwargs.get("num_beams") or config.num_beams or 1) > 1,
            "assistant_model": kwargs.get("assistant_model") is not None,
            "prompt_lookup_num_tokens": kwargs.get("prompt_lookup_num_tokens") or config.prompt_lookup_num_tokens,
            "use_cache=False": kwargs.get("use_cache") is False,
        }
        for name, is_there in others.items():
            if is_there:
                raise InvalidRequestError(f"speculation={mode!r} does not go together with {name}: leave one out")
    return _Speculation(mode=mode, draft_model=draft_model, num_drafts=num_drafts)


def _tell_kept(original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose blocks know how many columns its head looks at, so that states of others need not travel back."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = kwargs.get("logits_to_keep")
        is_some = isinstance(kept, int) and kept > 0  # 0: all; a tensor: any
        with looking_at_last(kept if is_some else None):
            return original(self, *args, **kwargs)

    return forward


@once_for_each
def distributed_class(model_class: type[Any]) -> type[Any]:
    """A subclass under the same name (pipelines look it up) with what ``DistributedModel`` adds."""
    body: dict[str, Any] = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
    }
    from transformers import GenerationMixin

    original = model_class.forward
    if not issubclass(model_class, GenerationMixin):
        return type(model_class.__name__, (DistributedModel, model_class), body)
    if "logits_to_keep" in inspect.signature(original).parameters:
        body["forward"] = _tell_kept(original)
    body["prepare_inputs_for_generation"] = skip_cached(model_class.prepare_inputs_for_generation)
    return type(model_class.__name__, (DistributedGeneration, model_class), body)
