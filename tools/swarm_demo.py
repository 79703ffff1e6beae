"""What ``tools/demo.py`` shows, once the environment is there."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from local_swarm import READY, LocalSwarm, Process, ProcessError, spans, stopping_in_order
from petals_core.errors import PetalsError

if TYPE_CHECKING:
    from petals_client.trace import HopTrace, StepTrace

START_TIMEOUT_S = 120.0
EXIT_DIFFERENT = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What the swarm generated, and how."""

    prompt_ids: list[int]
    new_ids: list[int]
    first_token_s: float
    tokens_per_s: float
    """Of the tokens after the first."""
    steps: Sequence[StepTrace]


def run(model: str, prompt: str, *, max_new_tokens: int, num_servers: int) -> int:
    """Show the demo and return the process's exit code."""
    console = Console(highlight=False)
    swarm = LocalSwarm()
    try:
        with stopping_in_order(), swarm:
            same = _show(console, swarm, model, prompt, max_new_tokens, num_servers)
    except (PetalsError, ProcessError) as error:
        Console(stderr=True, highlight=False).print(Text(f"error: {error}", style="red"))
        return EXIT_ERROR
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        return EXIT_INTERRUPTED
    finally:
        left = sum(process.group_is_alive for process in swarm.processes)
        console.print(f"stopped {len(swarm.processes)} processes, {left or 'none'} left behind", style="dim")
    return 0 if same else EXIT_DIFFERENT


def _show(console: Console, swarm: LocalSwarm, model: str, prompt: str, max_new_tokens: int, num_servers: int) -> bool:
    """Run the swarm and the comparison; True if the tokens are the same."""
    from petals_core.models.architecture import block_count
    from petals_core.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    num_blocks = block_count(checkpoint.config)
    if num_servers > num_blocks:
        raise ProcessError(f"the model has {num_blocks} blocks: --servers can be at most that")
    console.rule(f"[bold]{checkpoint.name}[/]: {num_blocks} blocks on {num_servers} servers", align="left")
    importing = threading.Thread(target=_import_client, daemon=True)
    importing.start()  # this takes as long as the servers take to start
    swarm.start_bootstrap()
    servers = [swarm.start_server(model, start, end) for start, end in spans(num_blocks, num_servers)]
    _await_ready(console, swarm, servers)
    importing.join()
    distributed, tokenizer = _connect(model, swarm.address)
    try:
        console.print(f"\n[dim]{prompt}[/]", end="")
        generation = _generate(distributed, tokenizer, prompt, max_new_tokens, _Printer(console, tokenizer))
    finally:
        distributed.close()
    _show_time(console, generation)
    return _compare(console, model, generation)


def _import_client() -> None:
    """Import what takes long."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import petals_client

    assert petals_client


def _await_ready(console: Console, swarm: LocalSwarm, servers: Sequence[Process]) -> None:
    """Wait until every server has said that it serves: with a table that follows, or in a file with a line for each.

    Raises:
        ProcessError: a process ended, or time is up.
    """
    deadline_s = time.monotonic() + START_TIMEOUT_S
    ready_s: dict[str, float] = {}
    if not console.is_terminal:
        console.print(f"bootstrap at {swarm.address}")
    with Live(console=console, refresh_per_second=10) if console.is_terminal else nullcontext() as live:
        while len(ready_s) < len(servers):
            swarm.check()
            for process in servers:
                found = next((line for line in tuple(process.lines) if READY.search(line.text)), None)
                if found is not None and process.name not in ready_s:
                    ready_s[process.name] = found.time_s - process.started_s
                    if live is None:
                        console.print(f"{process.name} ready after {ready_s[process.name]:.1f} s")
            if live is not None:
                live.update(_process_table(swarm, servers, ready_s))
            if time.monotonic() > deadline_s:
                late = ", ".join(process.name for process in servers if process.name not in ready_s)
                raise ProcessError(f"not ready after {START_TIMEOUT_S:.0f} s: {late}")
            time.sleep(0.05)


def _process_table(swarm: LocalSwarm, servers: Sequence[Process], ready_s: dict[str, float]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_row("[green]●[/]", "bootstrap", f"pid {swarm.processes[0].pid}", swarm.address)
    for process in servers:
        seconds = ready_s.get(process.name)
        state = f"ready after {seconds:.1f} s" if seconds is not None else "starting"
        table.add_row(
            "[green]●[/]" if seconds is not None else "[yellow]○[/]", process.name, f"pid {process.pid}", state
        )
    return table


def _connect(model: str, address: str) -> tuple[Any, Any]:
    """Make the client's half of the model, in float32 as the servers have theirs."""
    import torch
    from transformers import AutoTokenizer

    from petals_client import AutoDistributedModelForCausalLM

    distributed = AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=[address], torch_dtype=torch.float32
    )
    return distributed, AutoTokenizer.from_pretrained(model)


class _Printer:
    """A streamer that writes words to the terminal as they come and notes when."""

    def __init__(self, console: Console, tokenizer: Any) -> None:
        self.times_s: list[float] = []
        self._console = console
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_printed = 0
        self._is_prompt = True

    def put(self, token_ids: Any) -> None:
        if self._is_prompt:  # Transformers hands over the prompt first
            self._is_prompt = False
            return
        self.times_s.append(time.perf_counter())
        self._ids += token_ids.flatten().tolist()
        self._print(self._tokenizer.decode(self._ids, skip_special_tokens=True).rstrip("\ufffd"))

    def end(self) -> None:
        self._console.print()

    def _print(self, text: str) -> None:
        self._console.print(Text(text[self._num_printed :]), end="", soft_wrap=True)
        self._num_printed = max(self._num_printed, len(text))


def _generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, printer: _Printer) -> Generation:
    """Generate greedily through the swarm."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    num_prompt = inputs["input_ids"].shape[1]
    started_s = time.perf_counter()
    with model.inference_session(max_length=num_prompt + max_new_tokens) as session:
        output = model.generate(**inputs, **_greedy(max_new_tokens), streamer=printer)
        steps = session.trace()
    duration_s = printer.times_s[-1] - printer.times_s[0]
    return Generation(
        prompt_ids=inputs["input_ids"][0].tolist(),
        new_ids=output[0, num_prompt:].tolist(),
        first_token_s=printer.times_s[0] - started_s,
        tokens_per_s=(len(printer.times_s) - 1) / duration_s if duration_s else 0.0,
        steps=steps,
    )


def _greedy(max_new_tokens: int) -> dict[str, Any]:
    # Exactly so many tokens: the comparison should not be cut short by an end-of-text token. A small model repeats
    # itself; the penalty keeps it from that, and shows that logits processors work as they do locally.
    return {
        "do_sample": False,
        "repetition_penalty": 1.2,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": max_new_tokens,
    }


def _show_time(console: Console, generation: Generation) -> None:
    """Print the speed, and which server took how much of a step."""
    steps = generation.steps[1:] or generation.steps  # the first one is the prompt
    hops: dict[str, list[HopTrace]] = defaultdict(list)
    for step in steps:
        for hop in step.hops:
            hops[f"{hop.peer_id.short}  {hop.start}:{hop.end}"].append(hop)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("hop", "server", "blocks"):
        table.add_column(column)
    for column in ("network ms", "queue ms", "compute ms"):
        table.add_column(column, justify="right")
    for number, (name, traces) in enumerate(hops.items(), 1):
        server, blocks = name.split()
        parts = (_mean_ms(traces, "network_s"), _mean_ms(traces, "queue_s"), _mean_ms(traces, "compute_s"))
        table.add_row(str(number), server, blocks, *(f"{part:.2f}" for part in parts))
    console.print(
        f"\n[bold]{generation.tokens_per_s:.1f} tokens/s[/] through {len(hops)} servers, "
        f"first token after {1000 * generation.first_token_s:.0f} ms; mean of {len(steps)} steps:"
    )
    console.print(table)


def _mean_ms(traces: Sequence[HopTrace], attribute: str) -> float:
    return 1000 * sum(getattr(trace, attribute) for trace in traces) / len(traces)


def _compare(console: Console, model: str, generation: Generation) -> bool:
    """Generate the same with the whole model in this process, and say whether it is the same."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    local = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompt = torch.tensor([generation.prompt_ids])
    output = local.generate(prompt, attention_mask=torch.ones_like(prompt), **_greedy(len(generation.new_ids)))
    expected = output[0, prompt.shape[1] :].tolist()
    if expected == generation.new_ids:
        console.print(f"\n[green]identical[/]: the same {len(expected)} tokens as the model run in one piece here")
        return True
    pairs = zip(generation.new_ids, expected, strict=False)
    place = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if place is None:
        place = min(len(generation.new_ids), len(expected))
    console.print(
        f"\n[red]different[/] from token {place} on: the swarm said {generation.new_ids[place : place + 5]}, "
        f"the model run in one piece {expected[place : place + 5]}"
    )
    return False
