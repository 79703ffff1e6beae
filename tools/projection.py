"""A projection, not a measurement: a chain of A100 servers for BLOOM-176B, ``python3 tools/projection.py``.

Nobody here has three A100. The decode step of a chain is modelled as what it consists of:

    step = blocks * compute per block + servers * overhead per hop + (servers + 1) * (delay one way + bytes / rate)

First with the numbers that were published for the earlier Petals, whose one unknown, the overhead of a hop, is taken
from one published row; the other rows say how good the model is. Then with what a hop of this project was measured to
add, which says what it would give on the same servers.

A parallel forward of some rows goes through the client between any two servers, in micro-batches. All of them leave for
the first server together; it computes one after another, and the last one still has the rest of its way then:

    forward = transfer(all) + micro-batches * compute + (servers - 1) * compute + (2 * servers - 1) * transfer(one)

That is the earlier Petals. This project's parts go from the client around the ring of servers and follow each other, so
that all servers and links are at work at once, once a session is open:

    forward = opening + (servers + 1) * transfer(one) + servers * compute + (parts - 1) * slowest stage

A transfer is half a round trip and what TCP takes, whose window starts with ten segments and doubles with every round
trip (RFC 6928, RFC 5681), here up to a bound.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

MAX_DEVIATION = 0.10
NUM_BLOCKS = 70
HIDDEN_SIZE = 14_336
NUM_SERVERS = 3
STATE_BYTES = 2
"""Of an element of hidden states on the wire, float16."""
MODEL_STEP_S = 0.284
"""A token of BLOOM-176B in int8 on A100s, all blocks one after another: 284 ms on four of them, 287 ms on eight
(https://huggingface.co/blog/bloom-inference-pytorch-scripts, "accelerate int8", batch 1)."""
ATTENTION_S_PER_TOKEN = 0.0646 / 1920
"""What the cache's length adds to a step, from the published 1.71 and 1.54 steps/s at 128 and 2,048 tokens."""
HOP_S = 0.00019
"""What a hop of this project adds, ``tools/bench``, thin model, three servers (docs/benchmarks.md)."""
TOKENS_PER_TRIP = 2.5
"""With a draft model that is accepted as often as the demo model's has to be (``tools/bench_speculation.py``)."""
FORWARD_TOKENS = 128
"""Of each row of a parallel forward."""
MICRO_BATCH_TOKENS = 1024
"""At most in one micro-batch, by default, in the earlier Petals."""
PARTS_PER_STAGE, MIN_PART_TOKENS, MAX_PART_TOKENS = 4, 192, 512
"""How this project cuts a forward that goes around the ring, on links that are not slow (``petals_client.window``)."""
OPENING_ROUND_TRIPS = 3
"""Of a session."""
FIRST_WINDOW_BYTES = 10 * 1460
EARLIER_WINDOW_BYTES = 448_000
"""How much of a transfer of the earlier Petals is under way at most. Not published: chosen for the two rows at 100 ms;
each of them says nearly the same."""
OWN_WINDOW_BYTES = 6 << 20
"""What Linux lets a receive window grow to by itself (net.ipv4.tcp_rmem)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A published figure of the earlier Petals (Borzunov et al., "Petals: Collaborative Inference and Fine-tuning of
    Large Models", 2023, table 2), with three A100 servers."""

    network: str
    rate_bits_per_s: float
    round_trip_s: float
    num_cached: int
    steps_per_s: float


ROWS = (
    Row(network="1 Gbit/s, < 5 ms", rate_bits_per_s=1e9, round_trip_s=0.005, num_cached=128, steps_per_s=1.71),
    Row(network="100 Mbit/s, < 5 ms", rate_bits_per_s=1e8, round_trip_s=0.005, num_cached=128, steps_per_s=1.66),
    Row(network="100 Mbit/s, 100 ms", rate_bits_per_s=1e8, round_trip_s=0.1, num_cached=128, steps_per_s=1.23),
    Row(network="1 Gbit/s, < 5 ms", rate_bits_per_s=1e9, round_trip_s=0.005, num_cached=2048, steps_per_s=1.54),
    Row(network="100 Mbit/s, < 5 ms", rate_bits_per_s=1e8, round_trip_s=0.005, num_cached=2048, steps_per_s=1.49),
    Row(network="100 Mbit/s, 100 ms", rate_bits_per_s=1e8, round_trip_s=0.1, num_cached=2048, steps_per_s=1.11),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardRow:
    """A published figure of the same table: tokens per second of a parallel forward."""

    network: str
    rate_bits_per_s: float
    round_trip_s: float
    num_rows: int
    tokens_per_s: float


FORWARD_ROWS = (
    ForwardRow(network="1 Gbit/s, < 5 ms", rate_bits_per_s=1e9, round_trip_s=0.005, num_rows=1, tokens_per_s=70.0),
    ForwardRow(network="100 Mbit/s, < 5 ms", rate_bits_per_s=1e8, round_trip_s=0.005, num_rows=1, tokens_per_s=56.4),
    ForwardRow(network="100 Mbit/s, 100 ms", rate_bits_per_s=1e8, round_trip_s=0.1, num_rows=1, tokens_per_s=19.7),
    ForwardRow(network="1 Gbit/s, < 5 ms", rate_bits_per_s=1e9, round_trip_s=0.005, num_rows=64, tokens_per_s=253.6),
    ForwardRow(network="100 Mbit/s, < 5 ms", rate_bits_per_s=1e8, round_trip_s=0.005, num_rows=64, tokens_per_s=182.0),
    ForwardRow(network="100 Mbit/s, 100 ms", rate_bits_per_s=1e8, round_trip_s=0.1, num_rows=64, tokens_per_s=112.2),
)
FORWARD_S = {1: 0.490, 64: 2.945}
"""What a server computes on one micro-batch, by the rows of the batch: chosen for the three published rows of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What a decode step's time consists of."""

    num_servers: int = NUM_SERVERS
    model_step_s: float = MODEL_STEP_S
    hop_s: float

    def step_s(self, row: Row) -> float:
        """Seconds of a step that goes around the ring once."""
        compute_s = self.model_step_s + ATTENTION_S_PER_TOKEN * (row.num_cached - 128)
        leg_s = row.round_trip_s / 2 + 8 * HIDDEN_SIZE * STATE_BYTES / row.rate_bits_per_s
        return compute_s + self.num_servers * self.hop_s + (self.num_servers + 1) * leg_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What the time of a parallel forward consists of."""

    num_servers: int = NUM_SERVERS
    state_bytes: int
    """Of an element of hidden states on the wire."""
    window_bytes: int
    hop_s: float = 0.0

    def forward_s(self, row: ForwardRow) -> float:
        """Seconds until all micro-batches are through."""
        num_tokens = row.num_rows * FORWARD_TOKENS
        num_parts = -(-num_tokens // MICRO_BATCH_TOKENS)
        num_bytes = num_tokens * HIDDEN_SIZE * self.state_bytes
        compute_s = FORWARD_S[row.num_rows] + self.hop_s
        way_s = self.transfer_s(row, num_bytes) + (2 * self.num_servers - 1) * self.transfer_s(
            row, num_bytes // num_parts
        )
        return way_s + (num_parts + self.num_servers - 1) * compute_s

    def ring_s(self, row: ForwardRow) -> float:
        """Seconds around the ring."""
        num_tokens = row.num_rows * FORWARD_TOKENS
        wanted = -(-num_tokens // (PARTS_PER_STAGE * (self.num_servers + 1)))
        part_tokens = min(num_tokens, MAX_PART_TOKENS, max(MIN_PART_TOKENS, wanted))
        num_parts = -(-num_tokens // part_tokens)
        num_bytes = part_tokens * HIDDEN_SIZE * self.state_bytes
        compute_s = micro_batch_s(part_tokens) + self.hop_s
        slowest_s = max(compute_s, 8 * num_bytes / row.rate_bits_per_s)
        first_s = (self.num_servers + 1) * self.transfer_s(row, num_bytes) + self.num_servers * compute_s
        return OPENING_ROUND_TRIPS * row.round_trip_s + first_s + (num_parts - 1) * slowest_s

    def transfer_s(self, row: ForwardRow, num_bytes: float) -> float:
        """Seconds until so many bytes have arrived over a connection that was idle."""
        total_s, window_bytes = row.round_trip_s / 2, float(FIRST_WINDOW_BYTES)
        while num_bytes > 0:
            sent_bytes = min(window_bytes, self.window_bytes, num_bytes)
            num_bytes -= sent_bytes
            sending_s = 8 * sent_bytes / row.rate_bits_per_s
            total_s += max(sending_s, row.round_trip_s) if num_bytes > 0 else sending_s
            window_bytes *= 2
        return total_s


def micro_batch_s(num_tokens: int) -> float:
    """What a server computes on a micro-batch, on a line through the two sizes of the published rows."""
    slope_s = (FORWARD_S[64] - FORWARD_S[1]) / (MICRO_BATCH_TOKENS - FORWARD_TOKENS)
    return FORWARD_S[1] + slope_s * (num_tokens - FORWARD_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardProjection:
    """A published row of forwards, what the model says of it and of this project; all in tokens per second."""

    row: ForwardRow
    modelled: float
    ours: float
    ours_in_int8: float

    @property
    def deviation(self) -> float:
        """Of the model from what was published."""
        return self.modelled / self.row.tokens_per_s - 1


def project_forwards(hop_s: float) -> Sequence[ForwardProjection]:
    """All rows of forwards; ``hop_s`` is what a hop of this project adds."""
    # The earlier one quantizes to 8 bits here; this project only if it is allowed to.
    earlier = Forward(state_bytes=1, window_bytes=EARLIER_WINDOW_BYTES)
    ours = [Forward(state_bytes=size, window_bytes=OWN_WINDOW_BYTES, hop_s=hop_s) for size in (STATE_BYTES, 1)]
    return [
        ForwardProjection(
            row=row,
            modelled=row.num_rows * FORWARD_TOKENS / earlier.forward_s(row),
            ours=row.num_rows * FORWARD_TOKENS / ours[0].ring_s(row),
            ours_in_int8=row.num_rows * FORWARD_TOKENS / ours[1].ring_s(row),
        )
        for row in FORWARD_ROWS
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A published row, what the model says of it, and what it says of this project; all in tokens per second."""

    row: Row
    modelled: float
    ours: float
    ours_with_drafts: float

    @property
    def deviation(self) -> float:
        """Of the model from what was published."""
        return self.modelled / self.row.steps_per_s - 1


def published_hop_s(row: Row = ROWS[0]) -> float:
    """What a hop of the earlier Petals costs, so that one row comes out as published."""
    return (1 / row.steps_per_s - Chain(hop_s=0.0).step_s(row)) / NUM_SERVERS


def project(hop_s: float, tokens_per_trip: float) -> Sequence[Projection]:
    """All rows; ``hop_s`` is what a hop of this project adds."""
    earlier, ours = Chain(hop_s=published_hop_s()), Chain(hop_s=hop_s)
    return [
        Projection(
            row=row,
            modelled=1 / earlier.step_s(row),
            ours=1 / ours.step_s(row),
            ours_with_drafts=tokens_per_trip / ours.step_s(row),
        )
        for row in ROWS
    ]


def table(projections: Sequence[Projection], tokens_per_trip: float) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| network | cached tokens | published, earlier Petals | model of it | deviation | this project, projected "
        f"| with {tokens_per_trip:g} tokens a trip |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.row.network} | {each.row.num_cached:,} | {each.row.steps_per_s:.2f} | {each.modelled:.2f} | "
        f"{each.deviation:+.1%} | {each.ours:.2f} | {each.ours_with_drafts:.1f} |"
        for each in projections
    ]
    return "\n".join(lines)


def forward_table(projections: Sequence[ForwardProjection]) -> str:
    """The rows of forwards as a table in Markdown."""
    lines = [
        "| network | rows of 128 tokens | published, earlier Petals | model of it | deviation "
        "| this project, projected | with int8 states |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.row.network} | {each.row.num_rows} | {each.row.tokens_per_s:.1f} | {each.modelled:.1f} | "
        f"{each.deviation:+.1%} | {each.ours:.1f} | {each.ours_in_int8:.1f} |"
        for each in projections
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hop-ms", type=float, default=1e3 * HOP_S, help="added by a hop here (default: %(default)s)")
    parser.add_argument(
        "--tokens-per-trip", type=float, default=TOKENS_PER_TRIP, help="with a draft model (default: %(default)s)"
    )
    options = parser.parse_args()
    projections = project(options.hop_ms / 1e3, options.tokens_per_trip)
    print("PROJECTION: tokens/s of BLOOM-176B in int8 through three A100 servers, one stream. Not measured here.\n")
    print(table(projections, options.tokens_per_trip))
    print(
        f"\nOverhead of a hop: {1e3 * published_hop_s():.0f} ms published (from the first row), {options.hop_ms:g} ms "
        f"here. Blocks: {1e3 * MODEL_STEP_S:.0f} ms a token, the same for both. Offloading to one A100: 0.18 tokens/s "
        "at best.\n\nParallel forward, tokens/s:\n"
    )
    forwards = project_forwards(options.hop_ms / 1e3)
    print(forward_table(forwards))
    deviations = [each.deviation for each in projections] + [each.deviation for each in forwards]
    return 0 if all(abs(deviation) <= MAX_DEVIATION for deviation in deviations) else 1


if __name__ == "__main__":
    sys.exit(main())
