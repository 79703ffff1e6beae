"""What a distributed model adds to its Transformers class: sessions, and ``generate`` within them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from petals_client.base_model import BLOCKS_ATTRIBUTE, Generation, current_generation, once_for_each, session_of
from petals_client.drafting import decode_with_drafts
from petals_client.inference_session import DRAFT_COLUMNS, InferenceSession
from petals_client.remote_sequential import RemoteSequential
from petals_client.tuned_model import TunableModel
from petals_core.errors import InvalidRequestError, SessionLengthError
from petals_core.models.transformers_forward import CountingCache
from petals_core.models.transformers_generation import AssistedCall, GenerationEntry, skip_cached


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

    def close(self) -> None:
        """Let go of all connections; the model can't be used afterwards."""
        self.remote_blocks.chain.close()


class DistributedGeneration(DistributedModel, GenerationEntry):
    """The same for a class that generates."""

    def generate(
        self, inputs: Tensor | None = None, *args: Any, session: InferenceSession | None = None, **kwargs: Any
    ) -> Any:
        """Generate as Transformers does, with all its options.

        Outside of a session one is opened for the call. In a session (the one that is open, or ``session``) ``inputs``
        are the tokens that are new, None to go on from the last one; what comes back begins with them, not with what
        was said before. With ``past_key_values=session.cache`` the whole sequence goes in and comes back.

        Raises:
            PetalsError: see ``InferenceSession.step``; Transformers' own errors come as they are.
        """
        if kwargs.get("cache_implementation") == "paged":
            self.generate_batch()
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
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

    def _decode_rows_with_drafts(self, call: AssistedCall) -> Any:
        return decode_with_drafts(call)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: Transformers' own continuous batching manages pages of a local cache.

        Raises:
            InvalidRequestError: always.
        """
        raise InvalidRequestError(
            "paged generation manages a local cache: call generate() without cache_implementation; "
            "the servers batch by themselves"
        )


@once_for_each
def distributed_class(model_class: type[Any]) -> type[Any]:
    """A subclass under the same name (pipelines look it up) with what ``DistributedModel`` adds."""
    body: dict[str, Any] = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
    }
    from transformers import GenerationMixin

    if not issubclass(model_class, GenerationMixin):
        return type(model_class.__name__, (DistributedModel, model_class), body)
    body["prepare_inputs_for_generation"] = skip_cached(model_class.prepare_inputs_for_generation)
    return type(model_class.__name__, (DistributedGeneration, model_class), body)
