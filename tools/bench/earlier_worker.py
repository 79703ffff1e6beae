"""A process that runs the model through servers of Petals 2.2.0 and times the scenarios that it is asked for.

Runs in that version's environment, on Python 3.10: it shares nothing with the other worker but how it is asked.
"""

from __future__ import annotations

import importlib
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from bench import conversation

WARM_UP_TOKENS, WARM_UP_STEPS = 3, 20
FEW_TOKENS = 5
"""The prompt and as many tokens as tell a rate."""


class Clock:
    """Notes when each token came; the prompt comes first."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: object) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


class Runner:
    """The model behind its servers."""

    def __init__(self, name: str, address: str, hub: str) -> None:
        import torch

        self._torch: Any = torch
        self._criteria: Any = importlib.import_module("transformers").StoppingCriteriaList
        loader = importlib.import_module("petals").AutoDistributedModelForCausalLM  # not in our own environment
        self._model: Any = loader.from_pretrained(
            name, initial_peers=[address], torch_dtype=torch.float32, cache_dir=hub
        )
        self._generate(self._tokens(1, 16), WARM_UP_TOKENS, math.inf)

    def run(self, scenario: dict[str, Any]) -> float:
        """Do the scenario once; return the figure in its unit."""
        kind, length, num_rows = scenario["kind"], scenario["prompt_tokens"], scenario["num_rows"]
        if kind == "generate" and scenario["num_clients"] > 1:
            return self._clients(scenario)
        if kind == "generate":
            tokens = self._tokens(num_rows, length)
            if scenario["prompt"] is not None:
                tokens = self._torch.tensor([scenario["prompt"]])
            times_s = self._generate(tokens, scenario["new_tokens"], scenario["most_s"])
            return times_s[0] if scenario["first_token"] else (len(times_s) - 1) / (times_s[-1] - times_s[0])
        if kind == "steps":
            return 1000 * statistics.median(self._steps(length, scenario["new_tokens"]))
        torch, width = self._torch, self._model.config.hidden_size
        hidden = torch.randn(num_rows, length, width, generator=torch.Generator().manual_seed(0))
        started_s = time.perf_counter()
        if kind == "prefill":
            # Embeddings and head, as in the others' prefill, which goes through the whole model.
            tokens = self._tokens(num_rows, length)
            with torch.inference_mode(), self._model.model.layers.inference_session(max_length=length) as session:
                output = session.step(self._model.model.embed_tokens(tokens))
                self._model.lm_head(self._model.model.norm(output[:, -1:]))
        elif kind == "forward":
            with torch.inference_mode():
                self._model.model.layers(hidden)
        else:
            hidden.requires_grad_()
            self._model.model.layers(hidden).sum().backward()
        return float(num_rows * length / (time.perf_counter() - started_s))

    def _steps(self, num_prompt: int, num_steps: int) -> list[float]:
        """Seconds of steps of one token behind a prompt, without what ``generate`` does between them."""
        tokens = self._tokens(1, num_prompt + WARM_UP_STEPS + num_steps)
        inner, times_s = self._model.model, []
        with self._torch.inference_mode(), inner.layers.inference_session(max_length=tokens.shape[1]) as session:
            session.step(inner.embed_tokens(tokens[:, :num_prompt]))
            for token in tokens[:, num_prompt:].split(1, dim=1):
                started_s = time.perf_counter()
                self._model.lm_head(inner.norm(session.step(inner.embed_tokens(token))))
                times_s.append(time.perf_counter() - started_s)
        return times_s[WARM_UP_STEPS:]

    def _tokens(self, num_rows: int, length: int, seed: int = 0) -> Any:
        generator = self._torch.Generator().manual_seed(seed)
        return self._torch.randint(3, self._model.config.vocab_size, (num_rows, length), generator=generator)

    def _generate(self, tokens: Any, num_tokens: int, most_s: float) -> list[float]:
        """Seconds from the call to each new token; after ``most_s`` few tokens do."""
        clock = Clock()

        def is_over(tokens: Any, scores: Any, **options: Any) -> bool:
            return len(clock.times_s) > FEW_TOKENS and clock.times_s[-1] - started_s > most_s

        started_s = time.perf_counter()
        self._model.generate(
            tokens,
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            stopping_criteria=self._criteria([is_over]),
            streamer=clock,
        )
        return [time_s - started_s for time_s in clock.times_s[1:]]

    def _clients(self, scenario: dict[str, Any]) -> float:
        """Tokens per second of several clients together, while all of them are generating."""
        times_s: list[list[float]] = [[] for _ in range(scenario["num_clients"])]
        errors: list[BaseException] = []
        together = threading.Barrier(scenario["num_clients"])

        def client(number: int) -> None:
            try:
                tokens = self._tokens(1, scenario["prompt_tokens"], seed=number)
                together.wait()
                base_s = time.perf_counter()
                found_s = self._generate(tokens, scenario["new_tokens"], scenario["most_s"])
                times_s[number] = [base_s + time_s for time_s in found_s]
            except BaseException as error:
                errors.append(error)
                together.abort()

        threads = [threading.Thread(target=client, args=(number,)) for number in range(scenario["num_clients"])]
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


def main() -> None:
    name, address, hub = sys.argv[1:]

    def start() -> Callable[[dict[str, Any]], dict[str, Any]]:
        runner = Runner(name, address, hub)
        return lambda request: {"value": runner.run(request)}

    conversation.answer(start)


if __name__ == "__main__":
    main()
