"""Swarms whose servers compute on a GPU: ``python3 tools/check_gpu.py [--device cpu] [--json FILE]``.

Real servers with real sockets in this process compute tiny random models on the device, and what a client gets is
compared with the local model on the same device: greedy tokens of one prompt and of a left-padded batch, of eight
clients at once, with a server that disappears in the middle; logits with a LoRA adapter; gradients with respect to the
inputs and to LoRA matrices trained through the swarm; and that servers with quantized weights answer. It
needs the four packages installed, and PEFT.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from petals_client import AutoDistributedModelForCausalLM
from petals_core.testing.factories import make_checkpoint
from petals_server.testing import InProcessSwarm

FAMILIES: Final = (
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gpt_oss",
    "bloom",
    "falcon",
    "mixtral",
    "deepseek_v3",
    "qwen3_next",
)
SPANS: Final = ((0, 2), (2, 4))
NEW_TOKENS: Final = 16
MAX_DIFFERENCE: Final = 1e-5
LORA: Final[dict[str, Any]] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


class Bench:
    """One tiny model, locally on the device and in a swarm of servers on it."""

    def __init__(self, folder: Path, family: str, device: str) -> None:
        self.folder = make_checkpoint(folder, family, num_blocks=4)
        self.device = device
        self.local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)

    @contextmanager
    def swarm(self, num_copies: int = 1, **settings: Any) -> Iterator[InProcessSwarm]:
        """Servers of both halves, several times."""
        settings = {"torch_dtype": "float32", "device": self.device, **settings}
        swarm = InProcessSwarm()
        try:
            for start, end in SPANS * num_copies:
                swarm.add(self.folder, start, end, **settings)
            yield swarm
        finally:
            swarm.close()

    @contextmanager
    def model(self, swarm: InProcessSwarm, **options: Any) -> Iterator[Any]:
        """A client's model, whose own part is on the device too."""
        model = AutoDistributedModelForCausalLM.from_pretrained(
            self.folder, initial_peers=swarm.initial_peers, torch_dtype=torch.float32, **options
        )
        try:
            yield model.to(self.device)
        finally:
            model.close()

    def batch(self, rows: int, width: int, seed: int = 0) -> torch.Tensor:
        """Random tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 259, (rows, width), generator=generator).to(self.device)


def greedy(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> list[list[int]]:
    """What a model goes on with."""
    mask = torch.ones_like(tokens) if mask is None else mask
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    output = model.generate(tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **length, **options)
    found: list[list[int]] = output[:, tokens.shape[1] :].tolist()
    return found


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((actual.detach() - expected.detach()).norm() / expected.detach().norm())


# --- checks: each returns what it found and whether that is right -----------------------------------------------------


def check_tokens(bench: Bench) -> tuple[str, bool]:
    """One prompt, and a batch padded on the left."""
    tokens, mask = bench.batch(3, 12), torch.ones(3, 12, dtype=torch.long, device=bench.device)
    mask[1, :5] = mask[2, :9] = 0
    with bench.swarm() as swarm, bench.model(swarm) as model:
        one = greedy(model, tokens[:1]) == greedy(bench.local, tokens[:1])
        all_rows = greedy(model, tokens, mask) == greedy(bench.local, tokens, mask)
    return f"prompt {'same' if one else 'other'}, batch {'same' if all_rows else 'other'}", one and all_rows


def check_clients(bench: Bench) -> tuple[str, bool]:
    """Eight clients at once, each with a prompt of its own."""
    prompts = [bench.batch(1, 5 + 7 * number, seed=number) for number in range(8)]
    expected = [greedy(bench.local, prompt) for prompt in prompts]
    found: dict[int, list[list[int]]] = {}
    with bench.swarm() as swarm, bench.model(swarm) as model:

        def generate(number: int) -> None:
            found[number] = greedy(model, prompts[number], speculation="off")

        threads = [threading.Thread(target=generate, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    count = sum(found.get(number) == each for number, each in enumerate(expected))
    return f"{count} of {len(prompts)} same", count == len(prompts)


def check_failover(bench: Bench) -> tuple[str, bool]:
    """A server of the chain disappears between two tokens."""
    tokens = bench.batch(1, 20)
    with (
        bench.swarm(num_copies=2) as swarm,
        bench.model(swarm) as model,
        model.inference_session(max_length=128) as session,
    ):
        first = greedy(model, tokens)
        used = session.trace()[-1].hops[1].peer_id
        swarm.remove(next(server for server in swarm.servers if server.peer_id == used))
        more = bench.batch(1, 5, seed=1)
        second = greedy(model, more)
    longer = torch.cat([tokens, torch.tensor(first, device=bench.device), more], dim=1)
    same = [*first, *second] == [*greedy(bench.local, tokens), *greedy(bench.local, longer)]
    return "same" if same else "other", same


def check_adapter(bench: Bench, folder: Path) -> tuple[str, bool]:
    """Logits with an adapter that PEFT has saved."""
    twin = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32),
        peft.LoraConfig(**LORA, task_type="CAUSAL_LM"),
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in twin.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3 / weight.shape[1] ** 0.5
    twin.save_pretrained(str(folder))
    twin.to(bench.device)
    tokens = bench.batch(2, 15)
    with (
        bench.swarm(adapters=(str(folder),)) as swarm,
        bench.model(swarm, active_adapter=folder.name) as model,
        torch.inference_mode(),
    ):
        found = difference(model(tokens).logits, twin(tokens).logits)
    return f"{found:.1e}", found <= MAX_DIFFERENCE


def check_gradients(bench: Bench) -> tuple[str, bool]:
    """Gradients with respect to the inputs, through servers whose weights are frozen."""
    embedded = bench.local.get_input_embeddings()(bench.batch(2, 15)).detach()
    gradients: list[Any] = []
    with bench.swarm() as swarm, bench.model(swarm) as model:
        for each in (model, bench.local.requires_grad_(False)):
            inputs = embedded.clone().requires_grad_()
            each(inputs_embeds=inputs).logits.square().mean().backward()
            gradients.append(inputs.grad)
    found = difference(*gradients)
    return f"{found:.1e}", found <= MAX_DIFFERENCE


def check_tuning(bench: Bench) -> tuple[str, bool]:
    """Gradients of LoRA matrices of remote blocks."""
    tokens = bench.batch(2, 15)
    options = {"lora_rank": LORA["r"], "lora_alpha": LORA["lora_alpha"], "target_modules": LORA["target_modules"]}
    base = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32)
    twin = peft.get_peft_model(base, peft.LoraConfig(**LORA, task_type="CAUSAL_LM")).eval().to(bench.device)
    found = 0.0
    with bench.swarm() as swarm, bench.model(swarm, tuning_mode="lora", **options) as model:
        generator = torch.Generator().manual_seed(0)
        pairs: list[tuple[Any, Any]] = []
        for index, path, own in model.tuned_adapter.layers():
            for letter in "AB":
                weight = getattr(own, f"lora_{letter}")
                values = torch.randn(weight.shape, generator=generator) * 0.2 / weight.shape[1] ** 0.5
                name = next(
                    name
                    for name, _ in twin.named_parameters()
                    if f".{index}.{path}.lora_{letter}.default.weight" in name
                )
                pairs.append((weight, twin.get_parameter(name)))
                for each in pairs[-1]:
                    each.data = values.to(each)
        for each in (model, twin):
            each(tokens).logits.square().mean().backward()
        found = max(difference(own.grad, theirs.grad) for own, theirs in pairs)
    return f"{found:.1e}", found <= MAX_DIFFERENCE


def check_quantized(bench: Bench, form: str) -> tuple[str, bool]:
    """That servers with quantized weights answer, and how far the logits of a prompt are."""
    tokens = bench.batch(1, 20)
    with bench.swarm(quantization=form) as swarm, bench.model(swarm) as model, torch.inference_mode():
        found = difference(model(tokens).logits, bench.local(tokens).logits)
        length = len(greedy(model, tokens)[0])
    return f"logits differ by {found:.2f}, {length} tokens", found < 1 and length == NEW_TOKENS


def main() -> int:
    """Run the checks and print them; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    for name in ("petals_server", "petals_client", "petals_core", "petals_dht"):
        getLogger(name).setLevel(ERROR)
    logging.disable_progress_bar()
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}")
    rows: list[dict[str, Any]] = []

    def run(name: str, check: Callable[..., tuple[str, bool]], *args: Any) -> None:
        started_s = time.monotonic()
        try:
            text, is_right = check(*args)
        except Exception as error:
            text, is_right = f"{type(error).__name__}: {error}".splitlines()[0], False
        rows.append({"check": name, "found": text, "is_right": is_right})
        print(f"{'ok    ' if is_right else 'WRONG '} {name}: {text} ({time.monotonic() - started_s:.1f} s)", flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))

    with tempfile.TemporaryDirectory() as scratch:
        benches: dict[str, Bench] = {}
        for family in FAMILIES:
            benches[family] = Bench(Path(scratch) / family, family, options.device)
            run(f"{family}: tokens", check_tokens, benches[family])
        bench = benches["llama"]
        run("eight clients at once", check_clients, bench)
        run("a server disappears", check_failover, bench)
        run("LoRA adapter on servers", check_adapter, bench, Path(scratch) / "adapter")
        run("gradients of the inputs", check_gradients, bench)
        run("gradients of LoRA matrices", check_tuning, bench)
        for form in ("int8", "nf4"):
            run(f"weights in {form}", check_quantized, bench, form)
    return 0 if all(row["is_right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
