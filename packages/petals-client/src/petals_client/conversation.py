"""A conversation in one session: what was said stays with the servers, and only new tokens travel."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from petals_client.text import PieceStreamer
from petals_core.errors import SessionLengthError

if TYPE_CHECKING:
    from petals_client.client import Client


class Conversation:
    """Turns of a user and a model, in the form of the checkpoint's chat template if it has one."""

    def __init__(self, client: Client, *, max_length: int, settings: dict[str, Any]) -> None:
        self._client = client
        self._settings = settings
        self._messages: list[dict[str, str]] = []
        self._has_template = bool(getattr(client.tokenizer, "chat_template", None))
        self._tokens: torch.Tensor | None = None
        """Without a template: everything so far, [1, tokens]."""
        self._session = client.model.remote_blocks.new_session(max_length)

    def reply(self, text: str, write: Callable[[str], object]) -> str:
        """Say something and return the answer, whose pieces go to ``write`` as they come.

        After an error the turn has not happened: what was said before stays, and may be gone on from.

        Raises:
            SessionLengthError: the conversation has become too long.
            PetalsError: the swarm could not do it.
        """
        tokens = self._render(text)
        if tokens.shape[1] + 1 > self._session.max_length:
            raise SessionLengthError(
                f"the conversation has {tokens.shape[1]} tokens and {self._session.max_length} fit: "
                "begin another one, or give a larger --max-length"
            )
        settings = dict(self._settings)
        room = self._session.max_length - tokens.shape[1]
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
        sequences = self._client.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=self._session.cache,
            streamer=PieceStreamer(self._client.tokenizer, write),
            **settings,
        )
        answer: str = self._client.tokenizer.decode(sequences[0, tokens.shape[1] :], skip_special_tokens=True)
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self._tokens = sequences
        return answer

    def close(self) -> None:
        """Free what the servers keep; idempotent."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _render(self, text: str) -> torch.Tensor:
        """The tokens of the whole conversation with a new turn; the session finds out which are new."""
        tokenizer = self._client.tokenizer
        device = self._client.model.device
        if self._has_template:
            messages = [*self._messages, {"role": "user", "content": text}]
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            tokens: torch.Tensor = encoded["input_ids"].to(device)
            return tokens
        new: torch.Tensor = tokenizer(
            text if self._tokens is None else f"\n{text}\n",
            return_tensors="pt",
            add_special_tokens=self._tokens is None,
        )["input_ids"].to(device)
        return new if self._tokens is None else torch.cat([self._tokens, new], dim=1)
