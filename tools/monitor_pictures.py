"""Draw the pictures of the monitor that the documentation shows: a swarm from a seed, as SVG made by Rich.

    python tools/monitor_pictures.py                          # writes docs/monitor/*.svg
    python tools/monitor_pictures.py --print --servers 60 --size 120x40

The servers are made up; what is drawn of them is the product's own view, from announcements and probes of half an
hour.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
from pathlib import Path

import environment

environment.enter()

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.text import Text

from petals_core.addresses import Address
from petals_core.announcement import SignedAnnouncement
from petals_core.identity import Identity
from petals_dht.monitor.controls import Controls
from petals_dht.monitor.observations import Observations, Probe
from petals_dht.monitor.screen import Canvas, draw
from petals_dht.monitor.view import SwarmView, view_swarm
from petals_dht.overview import ModelSummary
from petals_dht.testing import make_announcement, make_info

SIZES = ("80x24", "120x40", "200x60")
NOW_S = 1_800_000_000.0
_ROUND_S = 15.0
_NUM_ROUNDS = 120
_CODE_FORMAT = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""As Rich's own, without fonts from elsewhere."""


def identity(seed: int, number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()))


class Simulation:
    """Made-up servers of one model, or of three where there are many, and what a monitor sees of them."""

    def __init__(self, num_servers: int, seed: int) -> None:
        self._random = random.Random(seed)
        self.observations = Observations(opened_at_s=0.0)
        is_small = num_servers < 10
        names = [("Llama-3.1-8B", 32)] if is_small else [("Qwen3-235B-A22B", 94), ("Llama-3.1-70B", 80), ("bloom", 70)]
        self.models = [
            ModelSummary(name, hashlib.sha256(name.encode()).hexdigest(), num_blocks, NOW_S + 1e6)
            for name, num_blocks in names
        ]
        self._servers = [self._make(number, seed, num_servers) for number in range(num_servers)]
        self.observations.note_models(self.models, at_s=0.0)
        for number in range(_NUM_ROUNDS + 1):
            self._round(number * _ROUND_S)

    def _make(self, number: int, seed: int, num_servers: int) -> tuple[Identity, ModelSummary, dict[str, object]]:
        draw_, is_small = self._random, num_servers < 10
        model = self.models[0 if is_small or number % 6 else 1 + number // 6 % 2]
        size = draw_.choice((8, 12, 16, 24)) if not is_small else 12
        start = number * 10 if is_small else min(draw_.randrange(0, model.num_blocks), model.num_blocks - size)
        place = draw_.choice(("lab", "attic", "campus", "studio", "garage", "library"))
        fields: dict[str, object] = {
            "model_name": model.model_name,
            "fingerprint": model.fingerprint,
            "num_blocks": model.num_blocks,
            "start": start,
            "end": min(start + size, model.num_blocks),
            "public_name": f"{place}-{number}" if number % 5 != 4 else "",
            "version": "0.1.9" if number % 13 == 5 else "0.2.0",
            "torch_dtype": "bfloat16",
            "quantization": draw_.choice(("none", "none", "int8", "nf4")),
            "adapters": ("poems", "support-bot")[: draw_.choice((0, 0, 1, 2))],
            "state": "draining" if number % 23 == 17 else "online",
            "inference_tokens_per_s": draw_.uniform(8, 220),
            "forward_tokens_per_s": draw_.uniform(800, 20_000),
            "addresses": (Address(f"198.51.100.{number + 1}", 31330),),
        }
        return identity(seed, number), model, fields

    def _announce(self, number: int, at_s: float) -> SignedAnnouncement:
        owner, _, fields = self._servers[number]
        speed = float(str(fields["inference_tokens_per_s"])) * self._random.uniform(0.8, 1.1)
        sessions = self._num_sessions(number, at_s)
        now = {
            "inference_tokens_per_s": speed,
            "cache_tokens_left": max(0, 200_000 - 30_000 * sessions),
            "load": float(max(0, sessions - 4)),
        }
        return make_announcement(owner, now_s=NOW_S + at_s - self._random.uniform(0, 40), **{**fields, **now})

    def _num_sessions(self, number: int, at_s: float) -> int:
        wave = (at_s / 300 + number * 1.7) % 8
        return int(abs(4 - wave) * (1 + number % 2))

    def _round(self, at_s: float) -> None:
        present = [number for number in range(len(self._servers)) if at_s >= 120 * (number % 7)]
        announced = {number: self._announce(number, at_s) for number in present}
        for number, signed in announced.items():
            is_silent = number % 29 == 11 or (len(self._servers) > 10 and number % 19 == 7 and at_s > 1500)
            self.observations.note_probe(signed.peer_id, self._probe(number, signed, at_s, is_silent=is_silent))
        for model in self.models:
            servers = [signed for number, signed in announced.items() if self._servers[number][1] is model]
            self.observations.note_servers(model, servers, at_s=at_s)

    def _probe(self, number: int, signed: SignedAnnouncement, at_s: float, *, is_silent: bool) -> Probe:
        announced = signed.announcement
        if is_silent:
            return Probe(at_s=at_s, failure=f"{announced.addresses[0]}: no answer (within 4 s)")
        info = make_info(signed, num_sessions=self._num_sessions(number, at_s))
        round_trip_s = 0.006 + 0.013 * (number * 7 % 11)
        return Probe(at_s=at_s, round_trip_s=round_trip_s, state=info.state, info=info)

    def view(self) -> SwarmView:
        at_s = _NUM_ROUNDS * _ROUND_S
        return view_swarm(self.observations, at_s=at_s, now_s=NOW_S + at_s)


def picture(view: SwarmView, controls: Controls, size: str) -> Text:
    width, height = (int(part) for part in size.split("x"))
    return Text("\n", no_wrap=True).join(draw(view, controls, Canvas(width=width, height=height), clock="14:05:30"))


def export(view: SwarmView, controls: Controls, size: str, path: Path) -> None:
    width, height = (int(part) for part in size.split("x"))
    console = Console(
        record=True, width=width, height=height, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(picture(view, controls, size), no_wrap=True, overflow="crop")
    svg = console.export_svg(
        title="petals-dht monitor", code_format=_CODE_FORMAT, unique_id=f"monitor-{path.stem}"
    )  # no class of CSS begins with a digit
    path.write_text(svg, encoding="utf-8")
    print(f"{path.name}: {len(svg):,} characters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=environment.ROOT / "docs" / "monitor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", help="show one picture here instead of writing files")
    parser.add_argument("--servers", type=int, default=60, help="with --print")
    parser.add_argument("--size", default=SIZES[0], help="with --print")
    parser.add_argument("--open", action="store_true", help="with --print: one server instead of the table")
    options = parser.parse_args()
    if options.print:
        view = Simulation(options.servers, options.seed).view()
        Console(highlight=False).print(picture(view, Controls(model=1, is_open=options.open), options.size))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for num_servers in (3, 60):
        view = Simulation(num_servers, options.seed).view()
        for size in SIZES:
            export(view, Controls(model=1), size, options.folder / f"{num_servers}-servers-{size}.svg")
        if num_servers == 60:
            export(
                view,
                Controls(model=1, sort="speed", is_open=True),
                SIZES[0],
                options.folder / f"one-server-{SIZES[0]}.svg",
            )


if __name__ == "__main__":
    main()
