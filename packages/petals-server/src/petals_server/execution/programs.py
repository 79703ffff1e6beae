"""Steps of few tokens as recorded programs: the operations of blocks in one row, without the modules around them.

With few tokens what a CPU does between two operations takes longer than many of them. A turn is recorded the first time
that one of its size comes: its operations are noted as they run, and become one function that calls the same operations
in the same order, or cheaper ones that give the same bits (:mod:`petals_server.execution.rewriting`). Attention is
noted as one call and looks up its batch each time. What depends on the content of tensors is no program, and is
computed as before.

Letters: T tokens of the packed row, H hidden size.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any, Final, cast

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from petals_core.models import transformers_attention
from petals_core.models.span import Span
from petals_server.execution import attention, linear
from petals_server.execution.batch import Batch
from petals_server.execution.packing import packing_of
from petals_server.execution.rewriting import RULES, Constants, Rule, note_form, rewrite
from petals_server.execution.traces import LoneTrace, Program
from petals_server.scheduling.plan import RowPart

log = logging.getLogger(__name__)

MAX_TOKENS: Final = 16
"""Turns of more tokens are computed as they are: there the operations themselves take the time."""
_NAME: Final = "petals_recorded"
_UNKNOWABLE: Final = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
)
_state = threading.local()


class RecordingError(Exception):
    """A step can't be recorded; the text says why."""


class StepPrograms:
    """Programs of one span, by the number of tokens. Used in the device's thread."""

    def __init__(self, span: Span, *, rules: Sequence[Rule] = RULES) -> None:
        """``rules``: how recorded operations are written anew."""
        self._span = span
        self._rules = rules
        self._programs: dict[int, Program] = {}
        self._trace: LoneTrace | None = None
        """The program for one token."""
        self.is_broken = False
        """Recording failed once: blocks do something that no program holds."""
        self._packing = packing_of(span)
        if self._packing is not None:
            self._packing.tell(self)

    def forget(self) -> None:
        """Let go of all programs, and of the weights that they hold; the next turn of each size records a new one."""
        self._programs.clear()
        self._trace = None

    def fits(self, num_tokens: int) -> bool:
        """Whether a turn of so many tokens is computed by a program, there already or made of it."""
        is_changing = self._packing is not None and self._packing.is_mixed  # the next layer's change would undo it
        return not self.is_broken and not is_changing and num_tokens <= MAX_TOKENS

    def holds(self, num_tokens: int) -> bool:
        """Whether there is a program for so many tokens."""
        return num_tokens in self._programs

    @property
    def is_traced(self) -> bool:
        """Whether the next token of one row is computed by :meth:`run_lone`."""
        return self._trace is not None

    @property
    def trace(self) -> LoneTrace | None:
        """The program for the next token of one row, while there is one."""
        return self._trace

    def run_lone(self, hidden_TH: torch.Tensor, position: int, row: RowPart) -> torch.Tensor | None:
        """Compute the next token of a row by the trace, under ``inference_mode``; None: :meth:`run` has to."""
        return None if self._trace is None else self._trace.run(hidden_TH, position, row.past, row.runs)

    def run(self, hidden_TH: torch.Tensor, positions_T: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Compute a turn that :meth:`fits`, under ``inference_mode``.

        Raises:
            RecordingError: it can't be recorded.
        """
        program = self._programs.get(hidden_TH.shape[0])
        if program is not None:
            return program(hidden_TH, positions_T, batch)
        try:
            output_TH, programs = _record(self._span, self._rules, hidden_TH, positions_T, batch)
            if output_TH.isnan().any():
                return output_TH  # nothing to compare with
            program = self._first_right(programs, output_TH, hidden_TH, positions_T, batch)
        except Exception as error:  # whatever blocks do that no program holds
            self.is_broken = True
            raise RecordingError(str(error) or type(error).__name__) from error
        self._programs[hidden_TH.shape[0]] = program
        if batch.num_tokens == 1:
            self._trace = self._make_trace(program, output_TH, hidden_TH, positions_T, batch)
        return output_TH

    def _first_right(
        self,
        programs: Sequence[Program],
        output_TH: torch.Tensor,
        hidden_TH: torch.Tensor,
        positions_T: torch.Tensor,
        batch: Batch,
    ) -> Program:
        """The first program that computes what was computed, and keeps the same keys and values."""
        kept = self._kept(batch)
        for program in programs:
            try:
                again_TH = program(hidden_TH, positions_T, batch)
            except Exception as error:  # whatever is wrong with it
                log.debug("a recorded program fails: %s", error)
                continue
            if torch.equal(again_TH, output_TH) and all(map(torch.equal, kept, self._kept(batch))):
                return program
            log.debug("a recorded program computes something else")
        raise RecordingError("the program computes something else")

    def _kept(self, batch: Batch) -> list[torch.Tensor]:
        """Copies of the keys and values of a batch's tokens."""
        return [
            tensors_SGD[layer].index_select(0, batch.slots_T(batch.cache.group_of[layer]))
            for layer in range(batch.first_layer, batch.first_layer + self._span.num_blocks)
            for tensors_SGD in (batch.cache.keys_SGD, batch.cache.values_SGD)
        ]

    def _make_trace(
        self,
        program: Program,
        output_TH: torch.Tensor,
        hidden_TH: torch.Tensor,
        positions_T: torch.Tensor,
        batch: Batch,
    ) -> LoneTrace | None:
        try:
            trace = LoneTrace(program, self._span.num_blocks, hidden_TH, batch)
            if trace.is_right(output_TH, hidden_TH, positions_T, batch):
                return trace
            log.debug("a traced step computes something else")
        except Exception as error:  # whatever torch has against it
            log.debug("a step can't be traced: %s", error)
        program(hidden_TH, positions_T, batch)  # what it writes to the cache may be missing there
        return None


class Recorder(TorchDispatchMode):
    """Notes operations in a graph while they run."""

    def __init__(self, inputs: Sequence[torch.Tensor], batch: Batch) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._batch = batch
        self.constants: Constants = {}
        """Tensors that are older than the recording: weights."""
        self._nodes: dict[int, Any] = {}
        self._alive: list[Any] = []
        """All tensors that were noted, so that no other one gets the same id."""
        self._is_noting = True
        for index, tensor in enumerate(inputs):
            self._know(tensor, self.graph.placeholder(f"input_{index}"))
        self._batch_node = self._last_placeholder = self.graph.placeholder("batch")

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        # A conversion that found nothing to do, or a dropout in evaluation, gives back what it got.
        is_idle = any(output is each for each in args) and not function._schema.is_mutable
        if self._is_noting and not is_idle:
            if _looks_into_tensors(function, args):
                raise RecordingError(f"blocks look into tensors ({function})")
            self._note(function, args, kwargs, output)
        return output

    def attend(
        self, module: torch.nn.Module, states: Sequence[torch.Tensor], options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, None]:
        """Attend, and note no more than that."""
        firsts = [each[0] for each in states]
        given: list[Any] = [cast(int, module.layer_idx), *firsts, *map(options.get, attention.OPTIONS)]
        self._is_noting = False
        try:
            output = attention.attend_in(self._batch, *given)
        finally:
            self._is_noting = True
        self._know(output, self.graph.call_function(attention.attend_in, (self._batch_node, *self._as_nodes(given))))
        return output.view(1, *states[0].shape[2:0:-1], -1), None

    def finish(self, output: torch.Tensor, rules: Sequence[Rule]) -> list[Program]:
        """The programs: what was noted, written anew, and as it is."""
        self.graph.output(self._as_nodes(output))
        plain = self._compiled()
        try:
            rewrite(self.graph, self.constants, rules)
        except Exception as error:  # operations called in a way that no rule foresaw
            log.debug("a recorded step stays as it is: %s", error)
            return [plain]
        return [self._compiled(), plain]

    def _compiled(self) -> Program:
        function = fx.GraphModule({}, self.graph).forward
        return Program(function, tuple(self.constants[node] for node in self.graph.nodes if node in self.constants))

    def _note(self, function: Any, given: Sequence[Any], options: dict[str, Any], output: Any) -> None:
        """Note an operation under the name that takes least time to call."""
        args, kwargs = self._as_nodes(tuple(given)), self._as_nodes(options)
        if function is linear.OPERATION:
            self._know(output, self.graph.call_function(linear.product, args[:3]))
            return
        name = function.overloadpacket.__name__
        for module in (torch, torch._C._nn):
            binding = getattr(module, name, None)
            if isinstance(binding, BuiltinFunctionType):
                node = self.graph.call_function(binding, args, kwargs)
                break
        else:
            if isinstance(getattr(torch.Tensor, name, None), MethodDescriptorType):
                node = self.graph.call_method(name, args, kwargs)
            else:
                node = self.graph.call_function(function, args, kwargs)
        if isinstance(output, torch.Tensor):
            self._know(output, node)
        else:
            for index, each in enumerate(output or ()):
                if isinstance(each, torch.Tensor):
                    self._know(each, self.graph.call_function(operator.getitem, (node, index)))

    def _know(self, tensor: torch.Tensor, node: fx.Node) -> None:
        note_form(node, tensor)
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def _as_nodes(self, tree: Any) -> Any:
        return tree_map_only(torch.Tensor, self._node_of, tree)

    def _node_of(self, tensor: torch.Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is None:
            with self.graph.inserting_after(self._last_placeholder):
                node = self.graph.placeholder(f"constant_{len(self.constants)}")
            self._last_placeholder = node
            self.constants[node] = tensor
            self._know(tensor, node)
        return node


def _looks_into_tensors(function: Any, args: Sequence[Any]) -> bool:
    """Whether what an operation gives is not said by the shapes and numbers that it is called with."""
    if function.overloadpacket is torch.ops.aten.index:
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return any(tag in function.tags for tag in _UNKNOWABLE)


def _record(
    span: Span, rules: Sequence[Rule], hidden_TH: torch.Tensor, positions_T: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, list[Program]]:
    recorder = Recorder((hidden_TH, positions_T), batch)
    _state.recorder = recorder
    try:
        with recorder:
            output_TH = span.forward_packed(hidden_TH[None], positions_T[None], attention=_NAME)[0]
    finally:
        _state.recorder = None
    return output_TH, recorder.finish(output_TH, rules)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """In the place of attention while a step is recorded."""
    recorder: Recorder = _state.recorder
    return recorder.attend(module, (query, key, value), options)


transformers_attention.register(_NAME, _attend)
