"""A process that runs the model in one way and times the scenarios that it is asked for."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from bench import conversation
from bench.plan import Kind

WARM_UP_TOKENS, WARM_UP_STEPS = 3, 20
FEW_TOKENS = 5
"""The prompt and as many tokens as tell a rate."""
MAX_OFFLOAD_TOKENS = 6
"""Offloading reads all weights for each token: a few tell its rate, and more would take minutes."""


class Runner:
    """A model, however it runs."""

    def __init__(self, kind: Kind, folder: str, address: str | None, scratch: str, draft: str | None) -> None:
        import torch

        self._torch = torch
        self._is_swarm = kind is Kind.SWARM
        self._is_offload = kind.is_offload
        self._options: dict[str, Any] = {}
        if kind is Kind.SWARM:
            self._options = {"speculation": "auto", "draft_model": draft} if draft else {"speculation": "off"}
        self._model = _load(kind, folder, address, scratch)
        self._generate(self._tokens(1, 16), WARM_UP_TOKENS, math.inf)

    def run(self, request: dict[str, Any]) -> float:
        """Do a scenario once; return the figure in its unit."""
        kind, num_rows, length = request["kind"], request["num_rows"], request["prompt_tokens"]
        if kind == "generate" and request["num_clients"] > 1:
            return self._clients(request)
        if kind == "steps":
            return 1000 * statistics.median(self._steps(length, request["new_tokens"]))
        tokens = self._tokens(num_rows, length)
        if kind == "generate":
            if request["prompt"] is not None:
                tokens = self._torch.tensor([request["prompt"]])
            most = MAX_OFFLOAD_TOKENS if self._is_offload else request["new_tokens"]
            times_s = self._generate(tokens, min(request["new_tokens"], most), request["most_s"])
            return rate(times_s) if not request["first_token"] else times_s[0]
        action: Callable[[], None] = {
            "prefill": lambda: self._prefill(tokens),
            "forward": lambda: self._forward(num_rows, length),
            "backward": lambda: self._backward(num_rows, length),
        }[kind]
        started_s = time.perf_counter()
        action()
        return tokens.numel() / (time.perf_counter() - started_s)

    def _tokens(self, num_rows: int, length: int, seed: int = 0) -> Any:
        generator = self._torch.Generator().manual_seed(seed)
        return self._torch.randint(3, self._model.config.vocab_size, (num_rows, length), generator=generator)

    def _generate(self, tokens: Any, num_tokens: int, most_s: float) -> list[float]:
        """Seconds from the call to each new token; after ``most_s`` few tokens do."""
        from bench_hop import Clock

        clock = Clock()

        def is_over(tokens: Any, scores: Any, **options: Any) -> Any:
            times_s = clock.times_s
            is_late = len(times_s) > FEW_TOKENS and times_s[-1] - started_s > most_s
            return self._torch.full((tokens.shape[0],), is_late)

        started_s = time.perf_counter()
        self._model.generate(
            tokens,
            attention_mask=self._torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            streamer=clock,
            stopping_criteria=[is_over],
            **self._options,
        )
        return [time_s - started_s for time_s in clock.times_s[1:]]

    def _clients(self, request: dict[str, Any]) -> float:
        """Tokens per second of several clients together, while all of them are generating."""
        num_clients = request["num_clients"]
        times_s: list[list[float]] = [[] for _ in range(num_clients)]
        errors: list[BaseException] = []
        together = threading.Barrier(num_clients)

        def client(number: int) -> None:
            try:
                tokens = self._tokens(1, request["prompt_tokens"], seed=number)
                together.wait()
                base_s = time.perf_counter()
                found_s = self._generate(tokens, request["new_tokens"], request["most_s"])
                times_s[number] = [base_s + time_s for time_s in found_s]
            except BaseException as error:
                errors.append(error)
                together.abort()

        threads = [threading.Thread(target=client, args=(number,)) for number in range(num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        start_s, end_s = max(times[0] for times in times_s), min(times[-1] for times in times_s)
        if end_s <= start_s:
            raise RuntimeError("the clients were not served together: one ended before another began")
        return sum(start_s < time_s <= end_s for times in times_s for time_s in times) / (end_s - start_s)

    def _steps(self, num_prompt: int, num_steps: int) -> list[float]:
        """Seconds of steps of one token behind a prompt, without what ``generate`` does between them."""
        tokens = self._tokens(1, num_prompt + WARM_UP_STEPS + num_steps)
        prompt, rest = tokens[:, :num_prompt], tokens[:, num_prompt:].split(1, dim=1)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._torch.inference_mode())
            options: dict[str, Any] = {}
            if self._is_swarm:
                stack.enter_context(self._model.inference_session(max_length=tokens.shape[1]))
                self._model(prompt)
            else:
                options = {"past_key_values": self._model(prompt, use_cache=True).past_key_values, "use_cache": True}
            times_s = []
            for token in rest:
                started_s = time.perf_counter()
                self._model(token, **options)
                times_s.append(time.perf_counter() - started_s)
        return times_s[WARM_UP_STEPS:]

    def _prefill(self, tokens: Any) -> None:
        with self._torch.inference_mode():
            if self._is_swarm:
                with self._model.inference_session(max_length=tokens.shape[1]):
                    self._model(tokens, logits_to_keep=1)
            else:
                self._model(tokens, use_cache=True, logits_to_keep=1)

    def _forward(self, num_rows: int, length: int) -> None:
        with self._torch.inference_mode():
            self._model.model(inputs_embeds=self._hidden(num_rows, length), use_cache=False)

    def _backward(self, num_rows: int, length: int) -> None:
        hidden = self._hidden(num_rows, length).requires_grad_()
        self._model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state.sum().backward()
        assert hidden.grad is not None

    def _hidden(self, num_rows: int, length: int) -> Any:
        generator = self._torch.Generator().manual_seed(0)
        return self._torch.randn(num_rows, length, self._model.config.hidden_size, generator=generator)


def rate(times_s: list[float]) -> float:
    """Tokens per second behind the first."""
    return (len(times_s) - 1) / (times_s[-1] - times_s[0])


def _load(kind: Kind, folder: str, address: str | None, scratch: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if kind is Kind.SWARM:
        from petals_client import AutoDistributedModelForCausalLM

        assert address is not None
        model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[address], dtype=torch.float32)
    elif kind is Kind.DISK_OFFLOAD:
        blocks = {f"model.layers.{n}": "disk" for n in range(AutoConfig.from_pretrained(folder).num_hidden_layers)}
        rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map={**rest, **blocks}, offload_folder=scratch
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if kind is Kind.CPU_OFFLOAD:
            from accelerate import cpu_offload

            model = cpu_offload(model, execution_device=torch.device("cpu"))
    for weight in model.parameters():  # as when something else is trained: gradients go to the inputs alone
        weight.requires_grad_(False)
    return model.eval()


def main() -> None:
    kind, folder, address, scratch, draft = sys.argv[1:]

    def start() -> Callable[[dict[str, Any]], dict[str, Any]]:
        runner = Runner(Kind(kind), folder, address or None, scratch, draft or None)
        return lambda request: {"value": runner.run(request)}

    conversation.answer(start)


if __name__ == "__main__":
    main()
