"""What the examples share: options, a swarm to try them with, batches of text, a progress bar, a loss curve."""

from __future__ import annotations

import argparse
import atexit
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"
_PICTURES = ROOT / "examples" / "pictures"


def enter() -> None:
    """Continue in the project's environment, which is made where it is missing; in a notebook there is one already."""
    if "ipykernel" not in sys.modules:
        sys.path.insert(0, str(ROOT / "tools"))
        import environment

        environment.enter("--group", "tools", "--group", "dev")


def parse(description: str, *, steps: int) -> argparse.Namespace:
    """The options that all examples have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=str(DEMO), help="folder or name on the hub (default: the demo model)")
    parser.add_argument(
        "--initial-peers", nargs="+", metavar="HOST:PORT", help="of the model's swarm (default: one in this process)"
    )
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument("--data", type=Path, help="data of your own instead of made data, where the example takes it")
    parser.add_argument("--compare", action="store_true", help="train a local model the same way, and compare")
    parser.add_argument(
        "--pictures", type=Path, default=_PICTURES, help="folder for the loss curve (default: %(default)s)"
    )
    _silence()
    return parser.parse_args([] if "ipykernel" in sys.modules else None)


def _silence() -> None:
    """Leave the terminal to the example: no bars of loading, and no advice for other uses."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("petals_server").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # by PEFT


class Swarm:
    """Where the model's blocks are served: the swarm that was named, or two servers in this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.initial_peers: list[str] = options.initial_peers or []
        self._model = options.model
        self._own: Any = None
        if not self.initial_peers:
            from petals_core.models.checkpoint import Checkpoint
            from petals_server.testing import InProcessSwarm

            print("no --initial-peers: two servers of this process serve the model", flush=True)
            self._own = InProcessSwarm()
            atexit.register(self.close)
            self._num_blocks = Checkpoint.open(options.model).config.num_hidden_layers
            self.add_servers()
            self.initial_peers = self._own.initial_peers

    def add_servers(self, *adapters: str) -> bool:
        """Two more servers, with adapters; False where the swarm is somebody else's."""
        if self._own is None:
            return False
        half = self._num_blocks // 2
        for start, end in ((0, half), (half, self._num_blocks)):
            self._own.add(self._model, start, end, torch_dtype="float32", adapters=adapters)
        return True

    def close(self) -> None:
        """Stop what was started here; idempotent."""
        own, self._own = self._own, None
        if own is not None:
            own.close()


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, padding on the left, so that each row's last token is in the last column."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_chat(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A batch of questions and answers; only the answers' tokens count for the loss."""
    import torch

    rows = []
    for question, answer in pairs:
        asked = tokenizer(chat_prompt(question)).input_ids
        answered = [*tokenizer(f" {answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append((asked, answered))
    width = max(len(asked) + len(answered) for asked, answered in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), -100)
    for row, (asked, answered) in enumerate(rows):
        first = width - len(asked) - len(answered)
        input_ids[row, first:] = torch.tensor(asked + answered)
        attention_mask[row, first:] = 1
        labels[row, width - len(answered) :] = torch.tensor(answered)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def chat_prompt(question: str) -> str:
    """What stands before an answer."""
    return f"User: {question}\nAssistant:"


def reply(model: Any, tokenizer: Any, question: str, max_new_tokens: int = 24) -> str:
    """The model's likeliest answer, up to its end or the end of the line."""
    inputs = tokenizer(chat_prompt(question), return_tensors="pt")
    tokens = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    text: str = tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text.strip().partition("\n")[0]


def batches(data: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Batches in the data's order, again and again."""
    place = 0
    while True:
        yield [data[(place + offset) % len(data)] for offset in range(size)]
        place += size


def track(steps: Iterable[int], description: str) -> Iterable[int]:
    """A progress bar over steps."""
    from rich.progress import track

    return track(list(steps), description=description)


def draw(losses: dict[str, Sequence[float]], title: str, path: Path) -> None:
    """Save a picture of loss curves, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture of the loss curve: install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, values in losses.items():
        axes.plot(values, label=name, linewidth=1.5 if name == "swarm" else 3.0, zorder=2 if name == "swarm" else 1)
    axes.set(xlabel="step", ylabel="loss", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"loss curve: {path}")


def report(what: str, value: float, *, target: float, at_least: bool, local: float | None = None) -> None:
    """Print the example's figure, and whether it reaches its target."""
    is_met = value >= target if at_least else value <= target
    wanted = f"{'at least' if at_least else 'at most'} {target:g}"
    print(f"{what}: {value:.4f} (target: {wanted}{'' if is_met else ', MISSED'})")
    if local is not None:
        print(f"the same with a local model: {local:.4f}")
