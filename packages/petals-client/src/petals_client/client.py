"""Text in, text out: a model behind four calls, blocking or for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from petals_client.status import ClientStatus, read_status
from petals_core.addresses import Address
from petals_core.errors import CheckpointError, InvalidRequestError, first_line

if TYPE_CHECKING:
    import torch

    from petals_client.options import ClientOptions

DEFAULT_NEW_TOKENS = 128


def connect(
    model: str | os.PathLike[str],
    *,
    initial_peers: Sequence[str | Address],
    swarm_key_file: str | os.PathLike[str] | None = None,
    identity: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    allowed_servers: str | Sequence[str] | None = None,
    blocked_servers: str | Sequence[str] | None = None,
    options: ClientOptions | None = None,
    active_adapter: str | None = None,
) -> Client:
    """Load the client's part of a model and join its swarm.

    Arguments and errors are those of ``AutoDistributedModelForCausalLM.from_pretrained``.
    """
    from petals_client.auto import AutoDistributedModelForCausalLM

    distributed = AutoDistributedModelForCausalLM.from_pretrained(
        model,
        initial_peers=initial_peers,
        swarm_key_file=swarm_key_file,
        identity=identity,
        dtype=dtype,
        device_map=device,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        allowed_servers=allowed_servers,
        blocked_servers=blocked_servers,
        options=options,
        active_adapter=active_adapter,
    )
    try:
        return Client(distributed, load_tokenizer(model, revision=revision, token=token, cache_dir=cache_dir))
    except BaseException:
        distributed.close()
        raise


async def connect_async(model: str | os.PathLike[str], **arguments: Any) -> AsyncClient:
    """Do what ``connect`` does, without blocking the event loop."""
    return AsyncClient(await asyncio.to_thread(connect, model, **arguments))


def load_tokenizer(model: str | os.PathLike[str], **arguments: Any) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        CheckpointError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{model} has no tokenizer that Transformers can read ({first_line(error)}): "
            "load the model with AutoDistributedModelForCausalLM and pass token ids"
        ) from None


class Client:
    """A model of a swarm. Also a context manager; any thread may use it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        """The distributed model: an instance of a class of Transformers."""
        self.tokenizer = tokenizer

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **options: Any) -> Iterator[str]: ...
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stream: bool = False,
        **options: Any,
    ) -> str | Iterator[str]:
        """Continue a text and return what comes behind it.

        Args:
            temperature: above 0 to sample; None or 0, without ``top_p``, always takes the likeliest token.
            top_p: sample only from the likeliest tokens that make up this share.
            seed: makes sampling repeatable.
            stream: return an iterator over pieces of text as they come; leaving it early ends the generation.
            options: anything else that ``model.generate`` takes.

        Raises:
            PetalsError: the swarm could not do it.
            InvalidRequestError: an argument is wrong, or the prompt is empty.
        """
        settings = generation_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        inputs = self.encode(prompt)
        if stream:
            return self._stream(inputs, seed, {**settings, **options})
        with seeded(seed):
            sequences = self.model.generate(**inputs, **settings, **options)
        text: str = self.tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    def encode(self, prompt: str) -> dict[str, Any]:
        """Return a prompt's ``input_ids`` and ``attention_mask``, one row each.

        Raises:
            InvalidRequestError: it has no tokens.
        """
        encoded = self.tokenizer(prompt, return_tensors="pt")
        inputs = {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        if inputs["input_ids"].shape[1] == 0:
            raise InvalidRequestError("the prompt is empty: write something to continue")
        return inputs

    def status(self) -> ClientStatus:
        """Return what is known of the model's servers, looked up now.

        Raises:
            NoPeersError: no peer of the swarm answers.
        """
        status: ClientStatus = self.model.remote_blocks.chain.run(read_status)
        return status

    def close(self) -> None:
        """Let go of all connections; idempotent."""
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, inputs: dict[str, Any], seed: int | None, options: dict[str, Any]) -> Iterator[str]:
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        generation = _Generation(self, inputs, seed, options, pieces.put)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            generation.stop()


class AsyncClient:
    """The same for asyncio: nothing here blocks the event loop."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def generate(self, prompt: str, **options: Any) -> str:
        """Continue a text; see ``Client.generate``. Cancelling it ends the generation."""
        return "".join([piece async for piece in self.stream(prompt, **options)])

    async def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> AsyncIterator[str]:
        """Iterate over pieces of the continuation; see ``Client.generate``. Leaving it early ends the generation."""
        settings = generation_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        inputs = self.client.encode(prompt)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

        def put(piece: str | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        generation = _Generation(self.client, inputs, seed, {**settings, **options}, put)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            await asyncio.shield(asyncio.to_thread(generation.stop))

    async def status(self) -> ClientStatus:
        """See ``Client.status``."""
        return await asyncio.to_thread(self.client.status)

    async def close(self) -> None:
        """Let go of all connections; idempotent."""
        await asyncio.to_thread(self.client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _Generation:
    """``generate`` in a thread of its own, which hands over pieces of text, then None or an error."""

    def __init__(
        self,
        client: Client,
        inputs: dict[str, Any],
        seed: int | None,
        options: dict[str, Any],
        put: Callable[[str | BaseException | None], None],
    ) -> None:
        self._client = client
        self._inputs = inputs
        self._seed = seed
        self._options = options
        self._put = put
        self._is_stopped = False
        # The session, and whatever else the caller's context holds, goes with it.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="petals-generate", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the generation and wait until it has ended: at the next token, at the latest."""
        self._is_stopped = True
        self._thread.join()

    def _run(self) -> None:
        from petals_client.text import PieceStreamer, StopWhen

        try:
            stopping = [StopWhen(lambda: self._is_stopped), *self._options.pop("stopping_criteria", ())]
            streamer = PieceStreamer(self._client.tokenizer, self._put)
            with seeded(self._seed):
                self._client.model.generate(
                    **self._inputs, **self._options, streamer=streamer, stopping_criteria=stopping
                )
        except BaseException as error:
            self._put(error)
        else:
            self._put(None)


def generation_settings(*, max_new_tokens: int, temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Turn the usual knobs into options of ``generate``.

    Raises:
        InvalidRequestError: a value is out of range.
    """
    if max_new_tokens < 1:
        raise InvalidRequestError(f"max_new_tokens is {max_new_tokens}: ask for at least 1")
    if temperature is not None and not 0.0 <= temperature <= 100.0:
        raise InvalidRequestError(f"temperature is {temperature}: choose 0 (always the likeliest) to 2 or so")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise InvalidRequestError(f"top_p is {top_p}: choose a share above 0, up to 1")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature == 0.0 or (temperature is None and top_p is None):
        settings["do_sample"] = False
    else:
        settings["do_sample"] = True
        if temperature is not None:
            settings["temperature"] = temperature
        if top_p is not None:
            settings["top_p"] = top_p
    return settings


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Make torch's random numbers repeatable inside, and leave those outside as they were."""
    if seed is None:
        yield
        return
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
