"""A process that runs the model in one way and times the scenarios that it is asked for."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from bench import conversation
from bench.plan import Kind, Scenario

WARM_UP_TOKENS = 3
MAX_OFFLOAD_TOKENS = 6
"""Offloading reads all weights for each token: a few tell its rate, and more would take minutes."""


class Runner:
    """A model, however it runs."""

    def __init__(self, kind: Kind, folder: str, address: str | None, scratch: str) -> None:
        import torch

        self._torch = torch
        self._is_swarm = kind is Kind.SWARM
        self._one_at_a_time = kind in (Kind.CPU_OFFLOAD, Kind.DISK_OFFLOAD)
        self._model = _load(kind, folder, address, scratch)
        self._generate(self._tokens(1, 16), WARM_UP_TOKENS)

    def run(self, scenario: Scenario) -> float:
        """Do the scenario once; return the figure in its unit."""
        if scenario.kind == "generate" and scenario.num_clients > 1:
            return self._clients(scenario)
        tokens = self._tokens(scenario.num_rows, scenario.prompt_tokens)
        if scenario.kind == "generate":
            most = MAX_OFFLOAD_TOKENS if self._one_at_a_time else scenario.new_tokens
            times_s = self._generate(tokens, min(scenario.new_tokens, most))
            return times_s[0] if scenario.first_token else (len(times_s) - 1) / (times_s[-1] - times_s[0])
        action: Callable[[], None] = {
            "prefill": lambda: self._prefill(tokens),
            "forward": lambda: self._forward(scenario),
            "backward": lambda: self._backward(scenario),
        }[scenario.kind]
        started_s = time.perf_counter()
        action()
        return tokens.numel() / (time.perf_counter() - started_s)

    def _tokens(self, num_rows: int, length: int, seed: int = 0) -> Any:
        generator = self._torch.Generator().manual_seed(seed)
        return self._torch.randint(3, self._model.config.vocab_size, (num_rows, length), generator=generator)

    def _generate(self, tokens: Any, num_tokens: int) -> list[float]:
        """Seconds from the call to each new token."""
        from bench_hop import Clock

        clock = Clock()
        started_s = time.perf_counter()
        self._model.generate(
            tokens,
            attention_mask=self._torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            streamer=clock,
            **({"speculation": "off"} if self._is_swarm else {}),
        )
        return [time_s - started_s for time_s in clock.times_s[1:]]

    def _clients(self, scenario: Scenario) -> float:
        """Tokens per second of several clients together, while all of them are generating."""
        if self._one_at_a_time:
            raise NotImplementedError("accelerate's hooks load weights for one thread at a time")
        times_s: list[list[float]] = [[] for _ in range(scenario.num_clients)]
        errors: list[BaseException] = []
        together = threading.Barrier(scenario.num_clients)

        def client(number: int) -> None:
            try:
                tokens = self._tokens(1, scenario.prompt_tokens, seed=number)
                together.wait()
                base_s = time.perf_counter()
                times_s[number] = [base_s + time_s for time_s in self._generate(tokens, scenario.new_tokens)]
            except BaseException as error:
                errors.append(error)
                together.abort()

        threads = [threading.Thread(target=client, args=(number,)) for number in range(scenario.num_clients)]
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

    def _prefill(self, tokens: Any) -> None:
        with self._torch.inference_mode():
            if self._is_swarm:
                with self._model.inference_session(max_length=tokens.shape[1]):
                    self._model(tokens, logits_to_keep=1)
            else:
                self._model(tokens, use_cache=True, logits_to_keep=1)

    def _forward(self, scenario: Scenario) -> None:
        with self._torch.inference_mode():
            self._model.model(inputs_embeds=self._hidden(scenario), use_cache=False)

    def _backward(self, scenario: Scenario) -> None:
        hidden = self._hidden(scenario).requires_grad_()
        self._model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state.sum().backward()
        assert hidden.grad is not None

    def _hidden(self, scenario: Scenario) -> Any:
        generator = self._torch.Generator().manual_seed(0)
        return self._torch.randn(
            scenario.num_rows, scenario.prompt_tokens, self._model.config.hidden_size, generator=generator
        )


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
    kind, folder, address, scratch = sys.argv[1:]

    def start() -> Callable[[dict[str, Any]], dict[str, Any]]:
        runner = Runner(Kind(kind), folder, address or None, scratch)
        return lambda request: {"value": runner.run(Scenario(**request))}

    conversation.answer(start)


if __name__ == "__main__":
    main()
