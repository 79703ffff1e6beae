"""Gradients through a swarm are those of the local model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AutoModelForCausalLM

from petals_client import AutoDistributedModelForCausalLM, ClientOptions, RemoteSequential
from petals_core.errors import ConfigurationError, InvalidRequestError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span

FAMILIES = ("llama", "bloom", "mixtral")
WIDTH = 64
NUM_BLOCKS = 6


def load(folder: Path, swarm: Any, **settings: Any) -> Any:
    """A distributed model with options."""
    options = ClientOptions.make(initial_peers=swarm.initial_peers, **settings)
    return AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[], options=options)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, shared_swarm: Any, checkpoints: Any) -> Iterator[tuple[Any, Any, Span]]:
    """A distributed model, the same as Transformers loads it, and its blocks."""
    folder = checkpoints(request.param)
    model = load(folder, shared_swarm(request.param))
    local = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    yield model, local, load_span(Checkpoint.open(folder), 0, NUM_BLOCKS)
    model.close()


@pytest.fixture
def llama(shared_swarm: Any, checkpoints: Callable[[str], Path]) -> Iterator[RemoteSequential]:
    """Remote blocks of the tiny llama."""
    model = load(checkpoints("llama"), shared_swarm("llama"))
    yield model.remote_blocks
    model.close()


def states(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def batch(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 259, (rows, width), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    """The norm of the difference is at most 1e-5 of the norm."""
    assert actual is not None
    assert expected is not None
    actual, expected = actual.detach(), expected.detach()
    assert float(expected.norm()) > 0
    assert float((actual - expected).norm()) <= 1e-5 * float(expected.norm())


def run_prompted(span: Span, hidden: Tensor, prompts: Tensor) -> Tensor:
    """What deep prompts mean, block by block."""
    for index in range(span.num_blocks):
        head = hidden[:, : prompts.shape[2]] + prompts[index]
        hidden = torch.cat([head, hidden[:, prompts.shape[2] :]], dim=1)
        hidden = span.slice(span.start + index, span.start + index + 1)(hidden)
    return hidden


# --- gradients of inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(0, 6), (1, 4), (2, 5), (3, 4)])
def test_gradients_of_hidden_states(pair: tuple[Any, Any, Span], start: int, end: int) -> None:
    model, _, span = pair
    hidden = states(2, 7).requires_grad_()
    output = model.remote_blocks[start:end](hidden)
    output = output[0] if isinstance(output, tuple) else output
    expected = span.slice(start, end)(hidden)
    weight = states(2, 7, seed=1)
    assert_same(output, expected)
    assert_same(*(torch.autograd.grad((each * weight).sum(), hidden)[0] for each in (output, expected)))


@pytest.mark.parametrize("on_the_left", [True, False])
def test_gradients_of_embeddings_of_a_padded_batch(pair: tuple[Any, Any, Span], on_the_left: bool) -> None:
    inputs, lengths = batch(3, 8), torch.tensor([8, 3, 5])[:, None]
    columns = torch.arange(8)
    mask = ((columns >= 8 - lengths) if on_the_left else (columns < lengths)).long()
    gradients = []
    for each in pair[:2]:
        weight = each.get_input_embeddings().weight.requires_grad_()
        logits = each(inputs, attention_mask=mask).logits[mask.bool()]
        gradients.append(torch.autograd.grad(F.cross_entropy(logits, inputs[mask.bool()]), weight)[0])
        weight.requires_grad_(False)
    assert_same(*gradients)


def test_gradients_of_all_hidden_states(pair: tuple[Any, Any, Span]) -> None:
    gradients = []
    for each in pair[:2]:
        embeds = states(1, 5).requires_grad_()
        outputs = each(inputs_embeds=embeds, output_hidden_states=True)
        sum(state.square().mean() * index for index, state in enumerate(outputs.hidden_states)).backward()
        gradients.append(embeds.grad)
    assert_same(*gradients)


def test_gradients_on_the_demo_model(shared_swarm: Any, checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints("demo")
    options = ClientOptions.make(initial_peers=shared_swarm("demo").initial_peers)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=[], options=options, dtype=torch.float32
    )
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    span = load_span(Checkpoint.open(folder), 0, 8, dtype="float32")
    inputs = batch(2, 12)
    mask = torch.ones_like(inputs)
    mask[1, :5] = 0
    try:
        gradients = []
        for each in (model, local):
            weight = each.get_input_embeddings().weight.requires_grad_()
            logits = each(inputs, attention_mask=mask).logits[mask.bool()]
            gradients.append(torch.autograd.grad(F.cross_entropy(logits, inputs[mask.bool()]), weight)[0])
        assert_same(*gradients)
        hidden = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        prompts = torch.randn(4, 1, 2, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = model.remote_blocks[2:6](hidden, prompts=prompts), run_prompted(span.slice(2, 6), hidden, prompts)
        for pair in zip(
            *(torch.autograd.grad(each.square().sum(), [hidden, prompts]) for each in outputs), strict=True
        ):
            assert_same(*pair)
    finally:
        model.close()


# --- deep prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows_of_prompts", [1, 3])
def test_gradients_of_deep_prompts(pair: tuple[Any, Any, Span], num_rows_of_prompts: int) -> None:
    model, _, span = pair
    hidden = states(3, 6).requires_grad_()
    prompts = torch.randn(NUM_BLOCKS, num_rows_of_prompts, 2, WIDTH).requires_grad_()
    weight = states(3, 6, seed=1)
    output = model.remote_blocks(hidden, prompts=prompts)
    output = output[0] if isinstance(output, tuple) else output
    expected = run_prompted(span, hidden, prompts)
    assert_same(output, expected)
    for actual, wanted in zip(
        *(torch.autograd.grad((each * weight).sum(), [hidden, prompts]) for each in (output, expected)), strict=True
    ):
        assert_same(actual, wanted)
    with torch.no_grad():
        again = model.remote_blocks(hidden, prompts=prompts)
    assert_same(again[0] if isinstance(again, tuple) else again, expected)


def test_deep_prompts_of_a_slice(llama: RemoteSequential, checkpoints: Callable[[str], Path]) -> None:
    span = load_span(Checkpoint.open(checkpoints("llama")), 2, 5)
    hidden = states(1, 4)
    prompts = torch.randn(3, 1, 4, WIDTH).requires_grad_()
    actual, expected = llama[2:5](hidden, prompts=prompts), run_prompted(span, hidden, prompts)
    assert_same(*(torch.autograd.grad(each.square().sum(), prompts)[0] for each in (actual, expected)))


# --- as torch users expect --------------------------------------------------------------------------------------------


def test_the_readme_of_earlier_petals(shared_swarm: Any, checkpoints: Callable[[str], Path]) -> None:
    from petals_client import DistributedBloomForCausalLM  # type: ignore[attr-defined]

    model = DistributedBloomForCausalLM.from_pretrained(
        checkpoints("bloom"),
        initial_peers=shared_swarm("bloom").initial_peers,
        low_cpu_mem_usage=True,
        torch_dtype=torch.float32,
    )
    local = AutoModelForCausalLM.from_pretrained(checkpoints("bloom")).eval()
    inputs = batch(1, 6)
    try:
        assert torch.equal(model.generate(inputs, max_length=10), local.generate(inputs, max_length=10))
        for each in (model, local):
            each.transformer.word_embeddings.weight.requires_grad = True
            loss = F.cross_entropy(each.forward(input_ids=inputs).logits.flatten(0, 1), inputs.flatten())
            loss.backward()
        assert_same(model.transformer.word_embeddings.weight.grad, local.transformer.word_embeddings.weight.grad)
    finally:
        model.close()
    model = DistributedBloomForCausalLM.from_pretrained(
        checkpoints("bloom"), tuning_mode="ptune", initial_peers=shared_swarm("bloom").initial_peers
    )
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            loss = F.cross_entropy(model(inputs).logits.flatten(0, 1), inputs.flatten())
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]
    finally:
        model.close()


def test_a_second_backward_of_a_retained_graph(llama: RemoteSequential) -> None:
    hidden = states(2, 5).requires_grad_()
    loss = llama[1:4](hidden).square().sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert_same(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, hidden)


def test_differentiating_twice_is_refused(llama: RemoteSequential) -> None:
    hidden = states(1, 3).requires_grad_()
    # The gradient of a plain sum does not depend on the output, and yet on the input.
    (gradient,) = torch.autograd.grad(llama[0:2](hidden).sum(), hidden, create_graph=True)
    with pytest.raises(InvalidRequestError, match="once, not twice"):
        gradient.sum().backward()


def test_nan_gradients_come_back_as_they_are(llama: RemoteSequential) -> None:
    hidden = states(2, 3).requires_grad_()
    weight = states(2, 3, seed=1)
    weight[1] = torch.nan
    (gradient,) = torch.autograd.grad((llama[0:2](hidden) * weight).sum(), hidden)
    assert gradient[1].isnan().all()
    assert gradient[0].isfinite().all()


def test_autocast_and_gradient_scaler(llama: RemoteSequential, checkpoints: Callable[[str], Path]) -> None:
    span = load_span(Checkpoint.open(checkpoints("llama")), 0, NUM_BLOCKS)
    results = []
    for blocks in (llama, span):
        layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        torch.nn.init.eye_(layer.weight)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = layer(states(1, 4))
        assert hidden.dtype is torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=blocks is llama):
            output = blocks(hidden.float())  # type: ignore[operator]
        output = output[0] if isinstance(output, tuple) else output
        assert output.dtype is torch.float32
        scaler.scale(output.square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append(layer.weight.detach() - torch.eye(WIDTH))
    assert float(results[1].abs().max()) > 1e-4
    assert float((results[0] - results[1]).norm()) <= 1e-3 * float(results[1].norm())


def test_half_precision_of_the_client(shared_swarm: Any, checkpoints: Callable[[str], Path], llama: Any) -> None:
    hidden = states(1, 4).requires_grad_()
    (exact,) = torch.autograd.grad(llama[0:3](hidden).square().sum(), hidden)
    half = hidden.detach().bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(llama[0:3](half).float().square().sum(), half)
    assert gradient.dtype is torch.bfloat16
    assert float((gradient.float() - exact).norm()) < 0.05 * float(exact.norm())


@pytest.mark.parametrize(("encoding", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 5e-2)])
def test_gradient_codec(
    shared_swarm: Any, checkpoints: Callable[[str], Path], llama: Any, encoding: str, tolerance: float
) -> None:
    model = load(checkpoints("llama"), shared_swarm("llama"), gradient_encoding=encoding)
    try:
        hidden = states(2, 4).requires_grad_()
        exact, coded = (
            torch.autograd.grad(blocks[0:5](hidden).square().sum(), hidden)[0]
            for blocks in (llama, model.remote_blocks)
        )
        assert 0 < float((coded - exact).norm()) <= tolerance * float(exact.norm())
    finally:
        model.close()


def test_an_unknown_gradient_codec(checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigurationError, match="int4"):
        ClientOptions.make(initial_peers="127.0.0.1:1", gradient_encoding="int4")


def test_gradcheck(new_swarm: Any, tmp_path: Path) -> None:
    from petals_core.testing.factories import make_checkpoint

    # Of a family that computes in no other dtype on its way, as llama's norms and bloom's softmax do.
    folder = make_checkpoint(tmp_path, "gpt2", num_blocks=2, hidden_size=8, dtype=torch.float64)
    swarm = new_swarm()
    swarm.add(folder, 0, 1)
    swarm.add(folder, 1, 2)
    model = load(folder, swarm)
    try:
        hidden = torch.randn(1, 2, 8, dtype=torch.float64, requires_grad=True)
        prompts = torch.randn(2, 1, 1, 8, dtype=torch.float64, requires_grad=True)
        blocks = model.remote_blocks
        assert torch.autograd.gradcheck(lambda *inputs: blocks(inputs[0], prompts=inputs[1]), (hidden, prompts))
    finally:
        model.close()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((5, 1, 2, WIDTH), "6 blocks and 2 rows"),
        ((6, 3, 2, WIDTH), "6 blocks and 2 rows"),
        ((6, 1, 4, WIDTH), "4 tokens need rows of as many tokens"),
        ((6, 1, 2, WIDTH - 1), "width 64"),
    ],
)
def test_prompts_of_a_wrong_shape(llama: RemoteSequential, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        llama(states(2, 3), prompts=torch.zeros(shape, requires_grad=True))


def test_gradients_through_a_session_are_refused(llama: RemoteSequential) -> None:
    hidden = states(1, 3).requires_grad_()
    with llama.inference_session(max_length=8):
        output = llama(hidden)
        with pytest.raises(InvalidRequestError, match="outside of the session"):
            (output[0] if isinstance(output, tuple) else output).sum().backward()
