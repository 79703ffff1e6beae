"""Whether a client's request is what the session, the model and the server's limits let it be."""

from __future__ import annotations

from petals_core.announcement import DTYPES
from petals_core.errors import InvalidRequestError, ProtocolError, SessionLengthError
from petals_core.tensors.codec import TensorSpec
from petals_core.wire.messages import Backward, Forward, Message, Step
from petals_server.config import ServerLimits
from petals_server.execution.session import SessionState
from petals_server.execution.states import PackedStates
from petals_server.loading import ServedModel
from petals_server.positions import check_positions


def check_step(step: Step, session: SessionState) -> None:
    """See whether a step fits its session.

    Raises:
        SessionLengthError: the session would become longer than its ``max_length``.
        InvalidRequestError: anything else does not fit.
    """
    ledger = session.ledger
    if len(step.row_tokens) != ledger.num_rows:
        raise InvalidRequestError(f"a step of {len(step.row_tokens)} rows in a session of {ledger.num_rows}")
    if step.keep > ledger.num_columns:
        raise InvalidRequestError(f"a step keeps {step.keep} columns where only {ledger.num_columns} are cached")
    if step.keep + max(step.row_tokens) > session.max_length:
        raise SessionLengthError(
            f"{step.keep} columns and {max(step.row_tokens)} new ones do not fit the session's max_length of "
            f"{session.max_length}: open a longer one"
        )
    order = step.row_order
    if order is not None and (len(order) != ledger.num_rows or max(order) >= ledger.num_rows):
        raise InvalidRequestError(f"row_order does not name a row for each of the session's {ledger.num_rows}")


def check_states(request: Step | Forward, message: Message, hidden_size: int) -> PackedStates:
    """The request's hidden states, whose payload is as long as its description says.

    Raises:
        InvalidRequestError: the tensor does not fit the request or the model.
    """
    if len(request.tensors) != 1:
        raise InvalidRequestError(f"{len(request.tensors)} tensors where one is expected: the hidden states")
    try:
        spec = TensorSpec.from_wire(request.tensors[0])
    except ProtocolError as error:
        raise InvalidRequestError(error.message) from None
    num_tokens = sum(request.row_tokens)
    if spec.shape != (num_tokens, hidden_size):
        raise InvalidRequestError(
            f"hidden states of shape {list(spec.shape)} where row_tokens and the model ask for "
            f"{[num_tokens, hidden_size]}"
        )
    if spec.dtype not in DTYPES:
        raise InvalidRequestError(f"hidden states of {spec.dtype} are no floating-point numbers")
    payload = message.received_payload
    if payload.nbytes != spec.num_bytes:
        raise InvalidRequestError(f"hidden states of {spec.num_bytes} bytes came with {payload.nbytes}")
    runs = request.position_runs
    if runs is not None and (
        len(runs) != len(request.row_tokens)
        or any(
            sum(count for _, count in row) != num_row_tokens
            for row, num_row_tokens in zip(runs, request.row_tokens, strict=True)
        )
    ):
        raise InvalidRequestError("position_runs do not give one position to each token of each row")
    return PackedStates(spec=spec, payload=payload, row_tokens=request.row_tokens, position_runs=runs)


def check_size(request: Forward | Backward, model: ServedModel, limits: ServerLimits) -> None:
    """See whether a request without a session is not too large for the server or the model.

    Raises:
        InvalidRequestError: it is.
        SessionLengthError: it needs positions that the model does not have.
    """
    row_tokens = request.row_tokens
    check_positions(row_tokens, request.position_runs, model.max_positions)
    num_tokens = sum(row_tokens)
    if num_tokens > limits.max_forward_tokens:
        raise InvalidRequestError(
            f"a request of {num_tokens} tokens is over the {limits.max_forward_tokens} that this server takes at once: "
            "send the rows in several requests"
        )
    if max(row_tokens) ** 2 > model.max_scores:
        raise InvalidRequestError(
            f"there is no memory for the attention of a row of {max(row_tokens)} tokens in one go: send shorter rows, "
            "or open a session"
        )
