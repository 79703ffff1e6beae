"""Recorded operations, written anew so that there are fewer and cheaper ones: each rule gives the same bits.

What a block's Python does for any model is more than a step needs: a leading dimension of one row, numbers that become
tensors in each operation, results that go to new memory. Steps of few tokens feel that, because there an operation
takes no longer than the way to it, and all the more where a processor's caches hold other things. Each rule says why
its result is equal to the last bit; programs are compared before they are used all the same.

Letters: T tokens, K width of a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import fx

Constants = dict[fx.Node, torch.Tensor]
"""What placeholders stand for that are no inputs."""
Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype."""
_ELEMENTWISE: Final = frozenset(
    ("add", "cos", "div", "exp", "gelu", "mul", "neg", "pow", "rsqrt", "sigmoid", "silu", "sin", "sqrt", "sub", "tanh")
)
_IN_PLACE: Final = frozenset(("add", "cos", "div", "mul", "neg", "rsqrt", "silu", "sin"))
"""Those that can write their result over an operand."""
_FRESH: Final = _ELEMENTWISE | {"addmm", "cat", "linear", "mean", "mm", "product", "sum", "take"}
"""Operations whose result lies in memory of its own."""
_NO_FORM: Final[Form] = ((), torch.bool)
"""Of nodes that are no tensor."""
_MAX_TAKEN: Final = 4096
"""Numbers up to which picking them one by one takes less time than cutting and joining pieces."""
_VIEWS: Final = frozenset(("reshape", "view"))
_MIN_EPSILON: Final = 1e-20
"""Numbers that are so small that it would matter in which order they are multiplied and added lie far below."""


def note_form(node: fx.Node, tensor: torch.Tensor) -> None:
    """Let rules know what a node's result looks like."""
    node.meta["form"] = tuple(tensor.shape), tensor.dtype


def rewrite(graph: fx.Graph, constants: Constants, rules: Sequence[Rule]) -> None:
    """Apply the rules to a graph whose nodes' forms are noted; ``constants`` change along with it.

    A graph with operations that write to what they are given stays as it is.
    """
    if any(_name(node).endswith("_") for node in graph.nodes):
        return
    rewriter = Rewriter(graph, constants)
    for rule in rules:
        for node in list(graph.nodes):
            if node.op.startswith("call_"):
                with graph.inserting_before(node):
                    new = rule(rewriter, node)
                if new is not None:
                    node.replace_all_uses_with(new)
        rewriter.drop_unused()
    for node in [node for node in constants if not node.users]:
        del constants[node]
        graph.erase_node(node)


class Rewriter:
    """A graph under way, and what rules share. What they add goes before the node that they look at."""

    def __init__(self, graph: fx.Graph, constants: Constants) -> None:
        self.graph = graph
        self.constants = constants
        self.flat: dict[fx.Node, fx.Node] = {}
        """Nodes of shape [1, ...] without their first dimension."""
        self.known: dict[Any, fx.Node] = {}
        """Nodes by what they compute."""
        self._made: dict[Any, fx.Node] = {}
        """New constants by what they are."""
        self._last_placeholder = [node for node in graph.nodes if node.op == "placeholder"][-1]

    def call(self, target: Any, *args: Any, form: Form, **kwargs: Any) -> fx.Node:
        """A new operation, a function or a method's name, and the form of its result."""
        make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = make(target, args, kwargs)
        node.meta["form"] = form
        return node

    def constant(self, key: Any, make: Callable[[], torch.Tensor]) -> fx.Node:
        """A new constant, or the one of the same key."""
        if key not in self._made:
            with self.graph.inserting_after(self._last_placeholder):
                node = self._last_placeholder = self.graph.placeholder(f"made_{len(self._made)}")
            self.constants[node] = tensor = make()
            note_form(node, tensor)
            self._made[key] = node
        return self._made[key]

    def number(self, value: float) -> fx.Node:
        """A number as a constant of shape [1] in float32."""
        return self.constant(repr(value), lambda: torch.tensor([value]))

    def drop_unused(self) -> None:
        """Forget operations that nothing needs."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op.startswith("call_"):
                self.graph.erase_node(node)
        self.known.clear()


def drop_ones(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``x * 1.0`` is x."""
    if _name(node) == "mul" and node.args[1] == 1.0 and _form(node) == _form(node.args[0]):
        return cast(fx.Node, node.args[0])
    return None


def multiply_squares(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``pow(x, 2)`` is x times x; torch computes it so."""
    if _name(node) == "pow" and node.args[1] == 2 and _dtype(node).is_floating_point:
        return rewriter.call(torch.mul, node.args[0], node.args[0], form=_form(node))
    return None


def sum_means(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """A mean is a sum that is divided by a count, and dividing by a power of two is multiplying by its inverse."""
    if _name(node) != "mean" or len(node.args) != 3 or node.kwargs or _dtype(node) is not torch.float32:
        return None
    states, dims, keeps = node.args
    if _dtype(states) is not torch.float32 or not _shape(node):
        return None
    count = math.prod(_shape(states)) // math.prod(_shape(node))
    total = rewriter.call(torch.sum, states, dims, keeps, form=_form(node))
    if count & (count - 1) == 0:
        return rewriter.call(torch.mul, total, 1.0 / count, form=_form(node))
    return rewriter.call(torch.div, total, float(count), form=_form(node))


def drop_leading_dimension(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Packed states are [1, T, K]: what does nothing with the first dimension gives the same without it."""
    flat = rewriter.flat
    if _name(node) == "select" and node.args[1:] == (0, 0) and node.args[0] in flat:
        return flat[cast(fx.Node, node.args[0])]
    shape = _shape(node)
    if _name(node) in _VIEWS and node.args[0] in flat and shape[:1] != (1,):
        return rewriter.call(node.target, flat[cast(fx.Node, node.args[0])], *node.args[1:], form=_form(node))
    if len(shape) < 2 or shape[0] != 1:
        return None
    flatten = _FLATTENED.get(_name(node))
    new = None if flatten is None else flatten(rewriter, node)
    if new is None:
        return None
    if not isinstance(new, fx.Node):
        new = rewriter.call(node.target, *new, form=(shape[1:], _dtype(node)), **node.kwargs)
    whole = rewriter.call(torch.unsqueeze, new, 0, form=_form(node))
    flat[whole] = new
    return whole


def join_views(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """A view of a view is a view, of the same shape none; to transpose a dimension of size 1 is a view too."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or "form" not in source.meta:
        return None
    if _name(node) in _VIEWS:
        if source.op == "call_method" and source.target == "view":
            source = cast(fx.Node, source.args[0])
        if _shape(source) == _shape(node):
            return source
        if source is not node.args[0]:
            return rewriter.call(node.target, source, list(_shape(node)), form=_form(node))
    if _name(node) == "transpose" and source.op == "call_method" and source.target == "view":
        _, first, second = node.args
        if 1 in (_shape(node)[cast(int, first)], _shape(node)[cast(int, second)]):
            return rewriter.call("view", source.args[0], list(_shape(node)), form=_form(node))
    return None


def join_equals(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """What was computed is not computed again."""
    if _name(node) not in _FRESH | _VIEWS | _FLATTENED.keys():
        return None
    key = (node.target, repr(node.args), repr(node.kwargs))
    known = rewriter.known.setdefault(key, node)
    return None if known is node else known


def turn_signs(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Of ``cat(-x[d:], x[:d]) * s`` the sign goes to s, which a step has but once: ``(-x) * s`` is ``x * (-s)``."""
    if _name(node) != "mul" or len(node.args) != 2 or not isinstance(node.args[1], fx.Node):
        return None
    halves, factors = node.args
    parts = _rotated(halves)
    if parts is None:
        return None
    first, second = parts
    size, dtype = _shape(halves)[-1], _dtype(factors)
    if _shape(factors)[-1:] != (size,) or dtype is not _dtype(halves):
        return None
    half = size // 2
    signs = rewriter.constant(
        ("signs", size, dtype), lambda: torch.tensor([-1.0, 1.0], dtype=dtype).repeat_interleave(half)
    )
    signed = rewriter.call(torch.mul, factors, signs, form=_form(factors))
    states = cast(fx.Node, first.args[0])
    count = math.prod(_shape(states))
    if 1 in _shape(states)[:-1] and count <= _MAX_TAKEN:
        places = rewriter.constant(
            ("turned", _shape(states)), lambda: torch.arange(count).view(_shape(states)).roll(half, -1)
        )
        turned = rewriter.call(torch.take, states, places, form=_form(halves))
    else:
        turned = rewriter.call(torch.cat, [second, first], -1, form=_form(halves))
    return rewriter.call(torch.mul, turned, signed, form=_form(node))


def multiply_matrices(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """A linear layer of [T, K] is a product with its weight transposed, which is the same memory; torch's way too."""
    if _name(node) != "linear" or node.kwargs or len(_shape(node)) != 2 or node.args[2:] not in ((), (None,)):
        return None
    states, weight = node.args[:2]
    if weight not in rewriter.constants:
        return None
    return rewriter.call(torch.mm, states, _transposed(rewriter, weight), form=_form(node))


def keep_sums(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """A product to which a bias is added is what a linear layer computes; traces would take it apart."""
    if _name(node) != "addmm" or node.kwargs or len(node.args) != 3:
        return None
    bias, states, weight = node.args
    if weight not in rewriter.constants or len(_shape(bias)) != 1:
        return None
    return rewriter.call(torch._C._nn.linear, states, _transposed(rewriter, weight), bias, form=_form(node))


def join_sums(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``x * a + e`` with a power of two a: the product is exact, so it does not matter whether it is rounded."""
    if _name(node) != "add" or len(node.args) != 2 or node.kwargs or _dtype(node) is not torch.float32:
        return None
    product, epsilon = node.args
    if not isinstance(product, fx.Node) or not isinstance(epsilon, float) or epsilon < _MIN_EPSILON:
        return None
    if _name(product) != "mul" or not isinstance(product.args[1], float) or len(product.users) > 1 or not _shape(node):
        return None
    if math.frexp(product.args[1])[0] != 0.5 or _dtype(product.args[0]) is not torch.float32:
        return None
    return rewriter.call(torch.add, rewriter.number(epsilon), product.args[0], form=_form(node), alpha=product.args[1])


def keep_numbers(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """A number beside float32 is rounded to float32 before it is added or multiplied: a tensor keeps it so."""
    if _name(node) not in ("add", "div", "mul", "sub") or len(node.args) != 2 or node.kwargs:
        return None
    states, number = node.args
    if not isinstance(number, int | float) or isinstance(number, bool) or not isinstance(states, fx.Node):
        return None
    if not (_dtype(states) is _dtype(node) is torch.float32) or not _shape(states):
        return None
    return rewriter.call(node.target, states, rewriter.number(float(number)), form=_form(node))


def write_over(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """What nobody else reads is overwritten by what is computed from it; sums and products can be turned round."""
    name = _name(node)
    if name not in _IN_PLACE or node.kwargs:
        return None
    operands = list(node.args)
    if name in ("add", "mul") and len(operands) == 2 and not _is_free(operands[0], node):
        operands.reverse()
    if not _is_free(operands[0], node):
        return None
    target = torch._C._nn.silu_ if name == "silu" else name + "_"
    return rewriter.call(target, *operands, form=_form(node))


Rule = Callable[[Rewriter, fx.Node], fx.Node | None]
"""Gives what takes the place of a node; None: it stays."""
RULES: Final[tuple[Rule, ...]] = (
    drop_ones,
    multiply_squares,
    sum_means,
    drop_leading_dimension,
    join_views,
    join_equals,
    turn_signs,
    multiply_matrices,
    keep_sums,
    join_sums,
    keep_numbers,
    join_equals,
    write_over,
)
"""In their order."""


def _transposed(rewriter: Rewriter, weight: Any) -> fx.Node:
    return rewriter.constant(("transposed", weight), rewriter.constants[weight].t)


Flattened = fx.Node | Sequence[Any] | None
"""A node that has the flat result, or what the operation is called with for it; None: it can't be had."""


def _flat(rewriter: Rewriter, node: Any) -> Any:
    """A node of shape [1, ...] without its first dimension."""
    if node not in rewriter.flat:
        if node in rewriter.constants:
            return rewriter.constant(("first", node), lambda: rewriter.constants[node][0])
        rewriter.flat[node] = rewriter.call(torch.select, node, 0, 0, form=(_shape(node)[1:], _dtype(node)))
    return rewriter.flat[node]


def _flat_elementwise(rewriter: Rewriter, node: fx.Node) -> Flattened:
    rank = len(_shape(node))
    return [_flat(rewriter, each) if len(_shape(each)) == rank else each for each in node.args]


def _flat_first(rewriter: Rewriter, node: fx.Node) -> Flattened:
    """Of operations that look at the last dimension alone."""
    return [_flat(rewriter, node.args[0]), *node.args[1:]]


def _flat_view(rewriter: Rewriter, node: fx.Node) -> Flattened:
    source = cast(fx.Node, node.args[0])
    return [rewriter.flat.get(source, source), list(_shape(node)[1:])]


def _flat_cut(rewriter: Rewriter, node: fx.Node) -> Flattened:
    """Of operations whose second argument names a dimension."""
    states, dim, *rest = node.args
    if isinstance(dim, int) and dim > 0:
        return [_flat(rewriter, states), dim - 1, *rest]
    return None


def _flat_transpose(rewriter: Rewriter, node: fx.Node) -> Flattened:
    states, first, second = node.args
    if isinstance(first, int) and isinstance(second, int) and first > 0 and second > 0:
        return [_flat(rewriter, states), first - 1, second - 1]
    return None


def _flat_unsqueeze(rewriter: Rewriter, node: fx.Node) -> Flattened:
    return cast(fx.Node, node.args[0]) if node.args[1] == 0 else _flat_cut(rewriter, node)


def _flat_cat(rewriter: Rewriter, node: fx.Node) -> Flattened:
    parts, dim = node.args
    return [[_flat(rewriter, each) for each in cast(list[fx.Node], parts)], -1] if dim == -1 else None


def _flat_sum(rewriter: Rewriter, node: fx.Node) -> Flattened:
    states, dims, keeps = node.args
    return [_flat(rewriter, states), dims, keeps] if dims == [-1] and keeps is True else None


_FLATTENED: Final[dict[str, Callable[[Rewriter, fx.Node], Flattened]]] = {
    **dict.fromkeys((*_ELEMENTWISE, "to"), _flat_elementwise),
    **dict.fromkeys(("linear", "product"), _flat_first),
    **dict.fromkeys(_VIEWS, _flat_view),
    "cat": _flat_cat,
    "slice": _flat_cut,
    "sum": _flat_sum,
    "transpose": _flat_transpose,
    "unsqueeze": _flat_unsqueeze,
}


def _name(node: Any) -> str:
    """What is computed; empty for what is no operation."""
    if not isinstance(node, fx.Node) or not node.op.startswith("call_"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.partition(".")[0]


def _form(node: Any) -> Form:
    form: Form = node.meta.get("form", _NO_FORM)
    return form


def _shape(value: Any) -> tuple[int, ...]:
    """Of a node's result; a number has none."""
    return _form(value)[0] if isinstance(value, fx.Node) else ()


def _dtype(node: Any) -> torch.dtype:
    return _form(node)[1]


def _is_free(operand: Any, node: fx.Node) -> bool:
    """Whether ``node`` alone reads what has memory of its own, of the size of its result."""
    return (
        _name(operand).removesuffix("_") in _FRESH and list(operand.users) == [node] and _form(operand) == _form(node)
    )


def _rotated(halves: Any) -> tuple[fx.Node, fx.Node] | None:
    """``x[:d]`` and ``x[d:]`` of ``cat(-x[d:], x[:d])`` along the last dimension, of which d is half."""
    if _name(halves) != "cat" or halves.args[1] != -1 or len(halves.args[0]) != 2:
        return None
    negated, first = halves.args[0]
    second = negated.args[0] if _name(negated) == "neg" else None
    if second is None or _name(first) != "slice" or _name(second) != "slice":
        return None
    states, *cut = first.args
    other, *other_cut = second.args
    size, last = _shape(states)[-1], len(_shape(states)) - 1
    half = size // 2
    if states is not other or size % 2 or cut != [last, 0, half] or other_cut[:2] != [last, half]:
        return None
    return (first, second) if other_cut[2] >= size else None
