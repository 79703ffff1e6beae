"""How the forward of a base model is entered when its blocks are elsewhere: its cache, arguments and hidden states.

Read against 5.17 and 5.23 (``cache_utils.py``, ``masking_utils.py``, ``utils/output_capturing.py``).

Letters: R rows of a batch, T new columns, P columns in the cache before them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import Cache

from petals_core.errors import InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# --- a cache that only counts -----------------------------------------------------------------------------------------


class CachedSession(Protocol):
    """What a cache stands for: columns that are kept elsewhere."""

    @property
    def position(self) -> int:
        """Columns that are cached."""

    @property
    def num_rows(self) -> int | None:
        """Rows of the batch; None before the first step."""

    def truncate(self, length: int) -> None:
        """Forget all columns but the first ``length``."""

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i be what row ``order[i]`` was."""


class CountingCache(Cache):
    """What models and ``generate`` see of a session. Holds no keys or values, and no call makes a trip.

    ``Cache`` with an empty list of layers is a valid cache: ``is_compileable`` is False and ``is_croppable`` True for
    it, and ``is_sliding``, ``is_linear`` and ``is_dummy`` are empty, so that ``find_first_full_attention_index`` gives
    0. Overridden is everything that asks for a length or changes the content.
    """

    def __init__(self, session: CachedSession) -> None:
        super().__init__(layers=[])
        self.session = session
        self.is_to_be_skipped = False
        """Whether the next inputs begin with what is cached already; see ``skip_cached``."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.session.position

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.session.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.session.position + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # "no maximum" in Transformers' words; a session refuses steps beyond its own

    def crop(self, tokens_to_remove: int) -> None:
        # ``generate`` counts from the end, and calls with 0 often. Positive numbers once were the length to keep.
        # Assisted generation of Transformers 5.17 passes a tensor.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            self.session.truncate(min(tokens_to_remove, self.session.position))
        elif tokens_to_remove < 0:
            self.session.truncate(max(0, self.session.position + tokens_to_remove))

    def reset(self) -> None:
        self.session.truncate(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.session.reorder(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.session.reorder(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.session.reorder([row for row in range(self.session.num_rows or 0) for _ in range(repeats)])

    @property
    def batch_size(self) -> int:
        return self.session.num_rows or -1

    @property
    def is_initialized(self) -> bool:
        return self.session.position > 0

    def update(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("a cache that only counts was asked to store keys and values")

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True  # or ``if past_key_values`` would take it for none, because its length is 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.session.position} columns)"

    def __deepcopy__(self, memo: object) -> CountingCache:
        return self  # ``generate`` copies its keyword arguments; a session has no copies


class EmptyCache(CountingCache):
    """The cache of a forward that keeps nothing, although the model wants a cache to return.

    Models make a ``DynamicCache`` when ``use_cache`` is on (it is by default) and none is given, and return it. Nobody
    would ever write to it, and passing it back in would give wrong results without a word. So this one goes in instead,
    and is refused when it comes back.
    """

    class _Nothing:
        position = 0
        num_rows = None

        def truncate(self, length: int) -> None:
            pass

        def reorder(self, order: Sequence[int]) -> None:
            pass

    def __init__(self) -> None:
        super().__init__(self._Nothing())


# --- entering a base model's forward ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BaseCall:
    """What a base model was called with, in so far as blocks elsewhere must know."""

    num_rows: int
    width: int
    attention_mask: torch.Tensor | None
    """[R, P + T]; None: all columns hold tokens."""
    position_ids: torch.Tensor | None
    """[R or 1, T]; None: the model's own choice."""
    past_key_values: Any
    use_cache: bool
    output_hidden_states: bool | int | Sequence[int]
    """What is asked for, as Transformers has it: all states, or some by their indices."""
    is_tuple_wanted: bool
    """``return_dict=False``"""
    arguments: dict[str, Any]
    """All arguments by name, for calling the model: it is asked for no hidden states and for a dictionary."""


def read_base_call(
    model: PreTrainedModel, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> BaseCall:
    """Sort the arguments of a call of a base model's ``forward``.

    Raises:
        InvalidRequestError: the call asks for something that can't be done with blocks that are elsewhere.
    """
    names = _positional_names(forward)
    if len(args) > len(names):
        raise TypeError(f"forward() takes at most {len(names)} positional arguments, {len(args)} were given")
    arguments = dict(zip(names, args, strict=False))
    if twice := arguments.keys() & kwargs.keys():
        raise TypeError(f"forward() got several values for {', '.join(sorted(twice))}")
    arguments.update(kwargs)

    inputs = arguments.get("input_ids")
    if inputs is None:
        inputs = arguments.get("inputs_embeds")
    if inputs is None or inputs.ndim < 2:
        raise InvalidRequestError(
            "pass input_ids of shape [rows, tokens], or inputs_embeds [rows, tokens, hidden size]"
        )
    num_rows, width = inputs.shape[:2]

    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise InvalidRequestError(
            "attention masks of four dimensions (or of another kind) can't be sent to servers: "
            "pass the 2D mask [rows, tokens] that is 1 at tokens and 0 at pads"
        )
    positions = arguments.get("position_ids")
    if positions is not None and (
        positions.ndim != 2 or positions.shape[1] != width or positions.shape[0] not in (1, num_rows)
    ):
        raise InvalidRequestError(
            f"position_ids of shape {list(positions.shape)} do not fit {num_rows} rows of {width} tokens"
        )
    output_hidden_states = arguments.get("output_hidden_states")
    if output_hidden_states is None:
        output_hidden_states = getattr(model.config, "output_hidden_states", None)
    is_tuple_wanted = arguments.get("return_dict", getattr(model.config, "return_dict", True)) is False
    if output_hidden_states is not None and output_hidden_states is not False:
        arguments |= {"output_hidden_states": False, "return_dict": True}
    for name in ("output_attentions", "output_router_logits"):
        if arguments.get(name) or (arguments.get(name) is None and getattr(model.config, name, False)):
            raise InvalidRequestError(
                f"{name} is not available: what happens inside the blocks stays on the servers that run them"
            )
    for name in ("encoder_hidden_states", "head_mask"):
        if arguments.get(name) is not None:
            raise InvalidRequestError(f"{name} can't be sent to servers: leave it out")
    use_cache = arguments.get("use_cache")
    if use_cache is None:
        use_cache = getattr(model.config, "use_cache", True)
    return BaseCall(
        num_rows=num_rows,
        width=width,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=arguments.get("past_key_values"),
        use_cache=bool(use_cache),
        output_hidden_states=False if output_hidden_states is None else output_hidden_states,
        is_tuple_wanted=is_tuple_wanted,
        arguments=arguments,
    )


def select_states(output_hidden_states: bool | int | Sequence[int], num_blocks: int) -> frozenset[int]:
    """Which hidden states are asked for: 0 is what goes into the blocks, i what comes out of the first i.

    Transformers counts negative indices from the end and ignores those out of range.
    """
    if isinstance(output_hidden_states, bool):
        return frozenset(range(num_blocks + 1)) if output_hidden_states else frozenset()
    chosen = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return frozenset(index % (num_blocks + 1) for index in chosen if -num_blocks - 1 <= index <= num_blocks)


def fill_hidden_states(
    output: Any, states: Mapping[int, torch.Tensor], wanted: frozenset[int], num_blocks: int, *, as_tuple: bool
) -> Any:
    """Put hidden states into a base model's output, as its own hooks would have done it with blocks in their places.

    What is not wanted is None. Behind the last block stands ``last_hidden_state``, as in all text models (with the
    final norm).
    """
    known = {**states, num_blocks: output.last_hidden_state}
    output["hidden_states"] = tuple(known[index] if index in wanted else None for index in range(num_blocks + 1))
    return output.to_tuple() if as_tuple else output


@functools.lru_cache(maxsize=64)
def _positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a method's positional parameters; decorators of Transformers keep the signature that they wrap."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)
