"""Sessions over several calls, their failures, and what is left of them: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_core.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    MissingBlocksError,
    SessionLengthError,
)
from petals_core.testing.factories import make_checkpoint

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["llama", "bloom", "demo"])
def pair(request: pytest.FixtureRequest, pairs: Any) -> Any:
    """A distributed model and the same as Transformers loads it."""
    return pairs(request.param)


@pytest.fixture(scope="module")
def swarm(pairs: Any) -> Any:
    return pairs("llama").swarm


@pytest.fixture(scope="module")
def model(pairs: Any) -> Any:
    return pairs("llama").model


@pytest.fixture(scope="module")
def local(pairs: Any) -> Any:
    return pairs("llama").local


def prompt(seed: int, rows: int = 1, width: int = 6) -> torch.Tensor:
    return torch.randint(3, 259, (rows, width), generator=torch.Generator().manual_seed(seed))


# --- several calls ----------------------------------------------------------------------------------------------------


def test_new_tokens_alone_and_none_to_go_on(pair: Any) -> None:
    model, local = pair.both
    first, second = prompt(0), prompt(1, width=3)
    with model.inference_session(max_length=40) as session:
        one = model.generate(first, max_new_tokens=4, **GREEDY)
        assert session.position == 9
        two = model.generate(None, max_new_tokens=3, **GREEDY)
        three = model.generate(second, max_new_tokens=5, **GREEDY)
        assert torch.equal(session.output_ids, torch.cat([one, two, three], dim=1))
        assert session.position == session.output_ids.shape[1] - 1
    expected = local.generate(first, max_new_tokens=7, **GREEDY)
    assert torch.equal(torch.cat([one, two], dim=1), expected)
    expected = local.generate(torch.cat([expected, second], dim=1), max_new_tokens=5, **GREEDY)
    assert torch.equal(torch.cat([one, two, three], dim=1), expected)
    pair.swarm.wait_for_sessions(0)


def test_truncate_between_calls(pair: Any) -> None:
    model, local = pair.both
    first, second = prompt(2, rows=2, width=7), prompt(3, rows=2, width=2)
    mask = torch.ones_like(first)
    mask[0, :3] = 0
    first = first * mask
    with model.inference_session(max_length=40) as session:
        model.generate(first, attention_mask=mask, max_new_tokens=5, **GREEDY)
        session.truncate(9)
        assert session.position == 9
        again = model.generate(second, max_new_tokens=6, **GREEDY)
        session.truncate(7)
        back = model.generate(None, max_new_tokens=5, **GREEDY)
    whole = local.generate(first, attention_mask=mask, max_new_tokens=5, **GREEDY)
    begun = torch.cat([whole[:, :9], second], dim=1)
    long_mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    assert torch.equal(again, local.generate(begun, attention_mask=long_mask, max_new_tokens=6, **GREEDY)[:, 9:])
    assert torch.equal(back, whole[:, 7:])


def test_whole_sequences_with_the_sessions_cache(pair: Any) -> None:
    model, local = pair.both
    with model.inference_session(max_length=40) as session:
        one = model.generate(prompt(4), past_key_values=session.cache, max_new_tokens=4, **GREEDY)
        steps = len(session.trace())
        longer = torch.cat([one, prompt(5, width=3)], dim=1)
        two = model.generate(longer, past_key_values=session.cache, max_new_tokens=2, **GREEDY)
        assert [step.num_tokens for step in session.trace()[steps:]] == [4, 1], "more than the new tokens travelled"
        # What differs from before is computed anew, and only that.
        other = torch.cat([one[:, :8], prompt(6, width=2)], dim=1)
        three = model.generate(other, past_key_values=session.cache, max_new_tokens=3, **GREEDY)
        assert [step.num_tokens for step in session.trace()[steps + 2 :]] == [2, 1, 1]
    assert torch.equal(two, local.generate(longer, max_new_tokens=2, **GREEDY))
    assert torch.equal(three, local.generate(other, max_new_tokens=3, **GREEDY))


@torch.no_grad()
def test_the_models_forward_in_a_session(pair: Any) -> None:
    model, local = pair.both
    tokens = prompt(7, rows=2, width=9)
    expected = local(tokens).logits
    with model.inference_session(max_length=9) as session:
        one = model(tokens[:, :5]).logits
        two = model(tokens[:, 5:6], past_key_values=session.cache).logits
        three = model(tokens[:, 6:]).logits
        assert session.position == 9
    torch.testing.assert_close(torch.cat([one, two, three], dim=1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_steps_with_pads_on_either_side(pair: Any) -> None:
    """The next tokens of a batch whose earlier steps had pads in different places."""
    model, local = pair.both
    tokens = prompt(8, rows=2, width=9)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    mask[1, 4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with model.inference_session(max_length=9):
        parts = [
            model(tokens[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last]).logits
            for first, last in ((0, 5), (5, 6), (6, 9))
        ]
    expected = local(tokens, attention_mask=mask, position_ids=positions).logits
    actual = torch.cat(parts, dim=1)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


def test_drafts_in_a_session(pair: Any) -> None:
    model, local = pair.both
    with model.inference_session(max_length=24):
        one = model.generate(prompt(9, width=12), max_new_tokens=6, prompt_lookup_num_tokens=4, **GREEDY)
        two = model.generate(None, max_new_tokens=6, prompt_lookup_num_tokens=4, **GREEDY)
    assert torch.equal(torch.cat([one, two], dim=1), local.generate(prompt(9, width=12), max_new_tokens=12, **GREEDY))


# --- limits -----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit(model: Any) -> None:
    with model.inference_session(max_length=8):
        with pytest.raises(SessionLengthError, match="9 tokens may have to be cached and the session holds 8"):
            model.generate(prompt(0), max_new_tokens=4, **GREEDY)
        with pytest.raises(SessionLengthError, match=r"0 cached and 9 new tokens do not fit .* max_length of 8"):
            model(prompt(0, width=9))
        assert model.generate(prompt(0), max_new_tokens=3, **GREEDY).shape == (1, 9)


def test_what_no_server_can_open(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is said at once, and no server is taken for one that is at fault."""
    with (
        model.inference_session(max_length=10_000_000),
        pytest.raises(SessionLengthError, match=r"at most 4,194,304 tokens a row, not 10,000,016"),
    ):
        model.generate(prompt(0), max_new_tokens=4, **GREEDY)
    with pytest.raises(InvalidRequestError, match="at most 1,024 rows, not 1,025: split the batch"):
        model.generate(prompt(0, rows=1025), max_new_tokens=4, **GREEDY)
    assert not [record for record in caplog.records if record.name.startswith("petals_client")]


def test_misuse(model: Any) -> None:
    with model.inference_session(max_length=8) as session:
        with pytest.raises(InvalidRequestError, match="nothing to go on from: pass a prompt"):
            model.generate(None, max_new_tokens=1)
        with pytest.raises(InvalidRequestError, match="beam search"):
            model.generate(prompt(0), num_beams=2, max_new_tokens=1)
        model.generate(prompt(0), max_new_tokens=1, **GREEDY)
        with pytest.raises(InvalidRequestError, match="has 1 rows and can't go on with 2"):
            model.generate(prompt(0, rows=2), max_new_tokens=1)
        with pytest.raises(InvalidRequestError, match="holds 7 tokens and can't be cut to 8"):
            session.truncate(8)
    with pytest.raises(InvalidRequestError, match="session is closed"):
        model.generate(prompt(0), past_key_values=session.cache, max_new_tokens=1)


# --- servers that are missing, wrong, silent or gone ------------------------------------------------------------------


def test_missing_blocks_are_named(new_swarm: Any, checkpoints: Any) -> None:
    swarm = new_swarm()
    folder = checkpoints("llama")
    swarm.add(folder, 0, 3)
    swarm.add(folder, 5, 6)
    with distributed(folder, swarm) as model:
        with pytest.raises(MissingBlocksError, match="blocks 3:5 of tiny-llama are held by no live server; wait"):
            model.generate(prompt(0), max_new_tokens=1)
        swarm.add(folder, 2, 6)
        assert model.generate(prompt(0), max_new_tokens=1).shape[1] == 7


def test_another_checkpoint_is_never_used(new_swarm: Any, checkpoints: Any, tmp_path: Path) -> None:
    swarm = new_swarm()
    swarm.add(checkpoints("llama"), 0, 6)
    other = make_checkpoint(tmp_path / "tiny-llama", "llama", num_blocks=6, seed=1)
    with (
        distributed(other, swarm) as model,
        pytest.raises(MissingBlocksError, match=r"blocks 0:6 of tiny-llama .* different checkpoint of that name"),
    ):
        model.generate(prompt(0), max_new_tokens=1)


def test_a_server_that_leaves(new_swarm: Any, checkpoints: Any, local: Any) -> None:
    """A session goes on from its tokens, or from what the client kept, with the servers that are left."""
    swarm = new_swarm()
    folder = checkpoints("llama")
    leaving = swarm.add(folder, 0, 4)
    swarm.add(folder, 4, 6)
    with distributed(folder, swarm) as model, model.inference_session(max_length=30):
        one = model.generate(prompt(0), max_new_tokens=4, **GREEDY)
        swarm.add(folder, 0, 3)
        swarm.add(folder, 3, 5)
        swarm.remove(leaving)
        two = model.generate(None, max_new_tokens=4, **GREEDY)
        swarm.wait_for_sessions(3)
    assert torch.equal(torch.cat([one, two], dim=1), local.generate(prompt(0), max_new_tokens=8, **GREEDY))
    swarm.wait_for_sessions(0)


def test_a_server_that_falls_silent(new_swarm: Any, checkpoints: Any, tmp_path: Path) -> None:
    """With nobody to take over there is a clear error within the deadline, and the model works when it is back."""
    swarm = new_swarm()
    folder = checkpoints("llama")
    silent = ServerProcess(folder, (2, 6), swarm.initial_peers, tmp_path)
    try:
        swarm.add(folder, 0, 2)
        options = ClientOptions.make(
            initial_peers=swarm.initial_peers, connect_timeout_s=1.0, step_timeout_s=1.0, recovery_timeout_s=1.0
        )
        with distributed(folder, swarm, options=options) as model:
            expected = model.generate(prompt(0), max_new_tokens=3, **GREEDY)
            with model.inference_session(max_length=30) as session:
                model.generate(prompt(0), max_new_tokens=1, **GREEDY)
                silent.signal(signal.SIGSTOP)
                with pytest.raises(
                    DeadlineExceededError, match=r"server \w{8} \(blocks 2:6\) failed: no answer to a step"
                ):
                    model.generate(None, max_new_tokens=2, **GREEDY)
                silent.signal(signal.SIGCONT)
                assert torch.equal(model.generate(None, max_new_tokens=2, **GREEDY)[0], expected[0, -2:])
                assert session.position == 8
        swarm.wait_for_sessions(0)
    finally:
        silent.kill()


def test_an_interrupt_leaves_nothing(new_swarm: Any, checkpoints: Any, tmp_path: Path) -> None:
    swarm = new_swarm()
    folder = checkpoints("llama")
    swarm.add(folder, 0, 6)
    with distributed(folder, swarm) as model:

        class Interrupt:
            """Raises the signal when the third step is under way."""

            count = 0

            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                self.count += 1
                if self.count == 3:
                    signal.raise_signal(signal.SIGINT)
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt(0), max_new_tokens=20, stopping_criteria=[Interrupt()], **GREEDY)
        swarm.wait_for_sessions(0)

        # While a step waits for an answer.
        entered, release = threading.Event(), threading.Event()
        holding = swarm.start(swarm.servers[0].holding.engine.call(lambda: (entered.set(), release.wait())))
        entered.wait()
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                model.generate(prompt(0), max_new_tokens=20, **GREEDY)
        finally:
            release.set()
            timer.join()
            holding.result()
        swarm.wait_for_sessions(0)
        assert model.generate(prompt(0), max_new_tokens=2, **GREEDY).shape[1] == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_after_a_fork(model: Any, swarm: Any) -> None:
    """Parent and child use the model, each with connections of its own; an open session stays with the parent."""
    with model.inference_session(max_length=20) as session:
        before = model.generate(prompt(0), max_new_tokens=3, **GREEDY)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                with pytest.raises(InvalidRequestError, match="opened before this process was forked"):
                    model.generate(None, max_new_tokens=1, **GREEDY)
                session.close()
                with model.inference_session(max_length=20):
                    result = model.generate(prompt(0), max_new_tokens=3, **GREEDY)
                os.write(writing, bytes([torch.equal(result, before)]))
            finally:
                os._exit(0)
        os.close(writing)
        during = model.generate(None, max_new_tokens=3, **GREEDY)
        with os.fdopen(reading, "rb") as answer:
            assert answer.read() == b"\x01", "the child got another result, or none"
        os.waitpid(child, 0)
    whole = model.generate(prompt(0), max_new_tokens=6, **GREEDY)
    assert torch.equal(torch.cat([before, during], dim=1), whole)
    swarm.wait_for_sessions(0)


class Embedded(torch.utils.data.Dataset[torch.Tensor]):
    """Prompts whose hidden states are computed by workers of a DataLoader."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(prompt(index)).logits[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_of_a_data_loader(model: Any, local: Any) -> None:
    data = Embedded(model)
    assert len(data[0]) == 6  # connected before the fork
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    batches = torch.cat(list(loader))
    with torch.no_grad():
        expected = local(torch.cat([prompt(index) for index in range(4)])).logits
    torch.testing.assert_close(batches, expected, rtol=1e-4, atol=1e-4)


# --- helpers ----------------------------------------------------------------------------------------------------------


@contextmanager
def distributed(folder: Path, swarm: Any, **arguments: Any) -> Iterator[Any]:
    """A distributed model that is closed at the end."""
    model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=swarm.initial_peers, **arguments)
    try:
        yield model
    finally:
        model.close()


class ServerProcess:
    """A server in a process of its own, which can be stopped as if its machine hung."""

    def __init__(self, folder: Path, blocks: tuple[int, int], initial_peers: list[str], home: Path) -> None:
        command = [
            *(sys.executable, "-m", "petals_server", "serve", str(folder)),
            *("--blocks", f"{blocks[0]}:{blocks[1]}", "--torch-dtype", "float32", "--host", "127.0.0.1"),
            *("--port", "0", "--threads", "1", "--attn-cache-tokens", "4096"),
        ]
        for peer in initial_peers:
            command += ["--initial-peers", peer]
        environment = {**os.environ, "PETALS_DATA_DIR": str(home), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("serving"):
                return
        raise AssertionError("the server did not start")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()
