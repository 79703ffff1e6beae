"""An emulated network on this machine: ``python3 tools/network_lab.py --hosts a:delay=25ms b:rate=20mbit -- COMMAND``.

COMMAND runs on the first host; commands in it reach the others by name, and run on them with ``--on HOST -- COMMAND``.
Everything ends with COMMAND. Needs Linux and root (or user namespaces), and only Python's standard library. Without
either, ``--forward`` gives one TCP connection the same delays and rates. docs/network-lab.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import forwarding, measurement, router, sandbox
from lab.settings import HostSettings, LabError, describe, parse_hosts, parse_toml


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line's arguments; what follows ``--`` is ``command``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("a lab")
    what.add_argument(
        "--hosts",
        nargs="+",
        metavar="HOST",
        default=[],
        help="NAME or NAME:KEY=VALUE,... with delay=25ms (one way to the middle), rate=20mbit or up= and down=, "
        "loss=1%%, queue=256kb, outage=10s+5s (start and duration, several with /)",
    )
    what.add_argument("--file", type=Path, metavar="TOML", help="hosts from a file, as tables [hosts.NAME]")
    what.add_argument("--on", metavar="HOST", help="where COMMAND runs: a host, or 'outside'; in a lab: of that lab")
    what.add_argument(
        "--run",
        nargs=2,
        action="append",
        default=[],
        metavar=("HOST", "COMMAND"),
        help="a shell command beside COMMAND",
    )
    what.add_argument("--seed", type=int, default=0, help="of the loss (default: %(default)s)")
    what.add_argument("--congestion-control", metavar="NAME", help="of TCP on all hosts (default: the machine's)")
    what.add_argument("--measure", action="store_true", help="instead of COMMAND: print what TCP gets through the lab")
    what.add_argument("--trips", type=int, default=50, help="round trips to measure (default: %(default)s)")
    what.add_argument("--seconds", type=float, default=3.0, help="of each transfer to measure (default: %(default)s)")
    what.add_argument(
        "--ring",
        type=float,
        metavar="MB",
        help="with --measure: send that much from each host to the next, all at once, and print the processor time",
    )
    what.add_argument("--json", action="store_true", help="print figures and the state as JSON")
    inside = parser.add_argument_group("in a lab")
    inside.add_argument("--change", nargs="+", metavar="HOST:KEY=VALUE", help="connect hosts differently from now on")
    inside.add_argument("--state", action="store_true", help="print how hosts are connected and what they have sent")
    without = parser.add_argument_group("without root")
    without.add_argument(
        "--forward",
        nargs=2,
        metavar=("LISTEN", "TARGET"),
        help="forward connections from [HOST:]PORT to HOST:PORT, as between two --hosts: who connects, and the target",
    )
    parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="what to run")
    own, double_dash, command = _split(argv)
    arguments = parser.parse_args(own)
    if double_dash:
        arguments.command = command
    elif arguments.command:
        parser.error("write -- before the command")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    arguments = parse(argv)
    try:
        return _act(arguments)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _act(arguments: argparse.Namespace) -> int:
    try:
        hosts = parse_toml(arguments.file.read_text()) if arguments.file else {}
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"can't read {arguments.file}: {error}") from error
    hosts |= parse_hosts(arguments.hosts) if arguments.hosts else {}
    if arguments.forward:
        return forwarding.run(arguments.forward[0], arguments.forward[1], hosts, arguments.command)
    if arguments.change or arguments.state:
        changes = dict(text.partition(":")[::2] for text in arguments.change or ())
        _print_state(router.ask(sandbox.current_folder(), changes).hosts, as_json=arguments.json)
        return 0
    if not arguments.command and not arguments.measure:
        raise LabError("there is nothing to run: write -- COMMAND at the end, or --measure")
    if not hosts:
        if arguments.on is None or arguments.measure:
            raise LabError("a lab has hosts: write --hosts NAME:delay=25ms,rate=20mbit ...")
        sandbox.enter_host(sandbox.current_folder(), arguments.on)
        _execute(arguments.command)
    if arguments.measure:
        main_job = sandbox.Job(host=sandbox.OUTSIDE, command=lambda: _measure(hosts, arguments))
    else:
        main_job = sandbox.Job(host=arguments.on or next(iter(hosts)), command=arguments.command)
    background = [sandbox.Job(host=host, command=["/bin/sh", "-c", command]) for host, command in arguments.run]
    return sandbox.run(
        hosts, main_job, background, seed=arguments.seed, congestion_control=arguments.congestion_control
    )


def _measure(hosts: dict[str, HostSettings], arguments: argparse.Namespace) -> int:
    figures: list[measurement.Figures] | measurement.Ring
    if arguments.ring:
        figures = measurement.measure_ring(list(hosts), int(arguments.ring * 1e6))
        table = measurement.ring_table(figures)
    else:
        figures = list(measurement.measure(hosts, arguments.trips, arguments.seconds))
        table = measurement.table(figures)
    if arguments.json:
        print(measurement.as_json(figures))
        return 0
    for name, settings in hosts.items():
        print(f"{name}: {describe(settings)}")
    print(f"\n{table}")
    return 0


def _print_state(state: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(state, indent=1))
        return
    for name, host in state.items():
        dropped = ", ".join(f"{count} by {why}" for why, count in host["dropped"].items() if count) or "none"
        print(
            f"{name}: {host['settings']}; sent {host['sent_packets']} packets ({host['sent_bytes']} bytes), "
            f"received {host['received_packets']} ({host['received_bytes']}), dropped {dropped}"
        )


def _execute(command: Sequence[str]) -> None:
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        raise LabError(f"can't run {shlex.join(command)}: {error.strerror}") from error


def _split(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in argv:
        return list(argv), False, []
    place = list(argv).index("--")
    return list(argv[:place]), True, list(argv[place + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
