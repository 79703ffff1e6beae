"""Figures as tables for the terminal, for Markdown and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.figures import Figure, Spread, short, speed_ratios
from bench.plan import HOP_SCENARIOS, HOP_SERVERS, LOOPBACK, Network, Plan, Unit

BAR_CELLS = 30
_BLOCKS = " ▏▎▍▌▋▊▉█"
_COLORS = {
    "local": "#4c566a",
    "petals-1": "#2e86ab",
    "petals-3": "#1b998b",
    "petals-3-drafts": "#7cc36a",
    "earlier-1": "#8f5fae",
    "earlier-3": "#6a3d8f",
    "cpu-offload": "#c8963e",
    "disk-offload": "#b5544a",
}


def rows(plan: Plan, figures: Sequence[Figure], network: Network) -> list[tuple[str, str, str, str, str, str]]:
    """A network's table: scenario, mode, median with quartiles, rounds, share of the reference's speed, remark."""
    titles = {mode.name: mode.title for mode in plan.modes}
    table = []
    for scenario in plan.scenarios:
        for figure in figures:
            if (figure.network, figure.scenario) != (network.name, scenario.name):
                continue
            spread, ratio = figure.spread, figure.ratio
            table.append(
                (
                    scenario.title,
                    titles[figure.mode],
                    f"{spread} {figure.unit}" if spread else "none",
                    str(len(figure.values)),
                    "reference" if figure.mode == figure.reference else f"{ratio}" if ratio else "none",
                    figure.error or "",
                )
            )
    return table


_AGAINST = ("network", "scenario", "this project", "compared with", "times as fast")
_COMPARED = (
    ("petals-1", "earlier-1"),
    ("petals-3", "earlier-3"),
    ("petals-3-drafts", "petals-3"),
    ("petals-3-drafts", "earlier-3"),
    ("petals-1", "disk-offload"),
    ("petals-3", "disk-offload"),
)


def comparisons(plan: Plan, figures: Sequence[Figure]) -> list[tuple[str, str, str, str, str]]:
    """How this project compares with others, in the same rounds."""
    found = {(each.network, each.scenario, each.mode): each for each in figures}
    titles = {mode.name: mode.title for mode in plan.modes}
    table: list[tuple[str, str, str, str, str]] = []
    for network in plan.networks:
        for scenario in plan.scenarios:
            for our_name, their_name in _COMPARED:
                ours = found.get((network.name, scenario.name, our_name))
                theirs = found.get((network.name, scenario.name, their_name))
                if ours is not None and theirs is not None and ours.values and theirs.values:
                    ratios = speed_ratios(ours.unit, *_pairs(ours, theirs))
                    pair = titles[our_name], titles[their_name]
                    table.append((network.title, scenario.title, *pair, str(Spread.of(ratios))))
    for name, count in itertools.product(HOP_SCENARIOS, HOP_SERVERS):
        ours_s, theirs_s = (_hop_s(found, name, who, count) for who in ("petals", "earlier"))
        if ours_s and theirs_s:
            pair = titles[f"petals-{count}"], titles[f"earlier-{count}"]
            hops = [Spread.of([1000 * each_s for each_s in hop_s]) for hop_s in (ours_s, theirs_s)]
            text = f"{hops[0]} ms instead of {hops[1]} ms"
            if hops[0].median > 0:
                text += f": {hops[1].median / hops[0].median:.1f} times less"
            else:
                text += ": no slower than a local step"
            title = next(each.title for each in plan.scenarios if each.name == name)
            table.append((LOOPBACK, f"added by a hop: {title}", *pair, text))
    return table


def _pairs(ours: Figure, theirs: Figure) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Values of the rounds that both have: who fails takes no part in the rounds behind it."""
    count = min(len(ours.values), len(theirs.values))
    return ours.values[:count], theirs.values[:count]


def _hop_s(found: dict[tuple[str, str, str], Figure], scenario: str, who: str, num_servers: int) -> list[float]:
    """What each server adds to a local step, round by round."""
    figures = [found.get((LOOPBACK, scenario, name)) for name in (f"{who}-{num_servers}", "local")]
    if figures[0] is None or figures[1] is None:
        return []
    pairs = zip(*_pairs(figures[0], figures[1]), strict=True)
    return [(_step_s(figures[0], remote) - _step_s(figures[1], local)) / num_servers for remote, local in pairs]


def _step_s(figure: Figure, value: float) -> float:
    """Seconds of a step of one token."""
    return value / 1000 if figure.unit is Unit.STEP else 1 / value


_HEADINGS = ("scenario", "mode", "median (quartiles)", "rounds", "times as fast", "remark")


def print_tables(console: Console, plan: Plan, figures: Sequence[Figure]) -> None:
    """Print a table for each network, and the picture in text."""
    for network in plan.networks:
        found = rows(plan, figures, network)
        if not found:
            continue
        table = Table(*_HEADINGS, title=network.title)
        last = None
        for row in found:
            if last is not None and row[0] != last:
                table.add_section()
            table.add_row(row[0] if row[0] != last else "", *row[1:])
            last = row[0]
        console.print(table)
    if compared := comparisons(plan, figures):
        table = Table(*_AGAINST, title="Comparisons")
        for line in compared:
            table.add_row(*line)
        console.print(table)
    console.print(text_picture(plan, figures), markup=False, highlight=False)


def markdown(plan: Plan, figures: Sequence[Figure], *, heading: str, facts: Sequence[str], picture: str | None) -> str:
    """A section of a document: what was run where, a table for each network, and what has to be said about it."""
    parts = [f"## {heading}", "\n".join(f"- {fact}" for fact in facts)]
    if picture:
        parts.append(f"![Decoding with one stream, by network]({picture})")
    for network in plan.networks:
        found = rows(plan, figures, network)
        if not found:
            continue
        remarks = any(row[-1] for row in found)
        width = len(_HEADINGS) if remarks else len(_HEADINGS) - 1
        lines = [_markdown_row(_HEADINGS[:width]), _markdown_row(["---"] * width)]
        lines += [_markdown_row(row[:width]) for row in found]
        parts.append(f"### {network.title}\n\n" + "\n".join(lines))
    if compared := comparisons(plan, figures):
        lines = [_markdown_row(_AGAINST), _markdown_row(["---"] * len(_AGAINST)), *map(_markdown_row, compared)]
        parts.append("### Comparisons\n\n" + "\n".join(lines))
    parts.append("Medians with quartiles. *Times as fast*: ratios of the same round, in which the modes take turns.")
    return "\n\n".join(parts) + "\n"


def text_picture(plan: Plan, figures: Sequence[Figure], scenario: str = "decode") -> str:
    """Bars of one scenario, by network and mode."""
    found = _bars(plan, figures, scenario)
    if not found:
        return ""
    most = max(median for _, _, median, _, _ in found)
    network_width, mode_width = max(len(bar[0]) for bar in found), max(len(bar[1]) for bar in found)
    title = next(each for each in plan.scenarios if each.name == scenario)
    lines = [f"{title.title}, {title.unit}"]
    for network, mode, median, _, _ in found:
        lines.append(f"{network:<{network_width}}  {mode:<{mode_width}}  {bar(median / most)} {short(median)}")
    return "\n".join(lines)


def bar(share: float) -> str:
    """A bar of eighths of cells."""
    eighths = round(share * BAR_CELLS * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_BLOCKS[rest] if rest else "")


def save_picture(path: Path, plan: Plan, figures: Sequence[Figure]) -> None:
    """Write a PNG with a panel for each scenario: bars by network and mode, with quartiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = [scenario for scenario in plan.scenarios if _bars(plan, figures, scenario.name)]
    num_columns = 2 if len(panels) > 1 else 1
    num_rows = max(1, -(-len(panels) // num_columns))
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=(6.5 * num_columns, 3.2 * num_rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    titles = {mode.title: mode.name for mode in plan.modes}
    for axis, scenario in zip(axes.flat, panels, strict=False):
        found = _bars(plan, figures, scenario.name)
        networks = list(dict.fromkeys(bar[0] for bar in found))
        modes = [mode.name for mode in plan.modes if any(bar[1] == mode.title for bar in found)]
        width = 0.8 / len(modes)
        for network, mode, median, low, high in found:
            number = modes.index(titles[mode])
            place = networks.index(network) + (number - (len(modes) - 1) / 2) * width
            color = _COLORS.get(titles[mode], "#888888")
            axis.bar(place, median, width, color=color, label=mode)
            axis.errorbar(place, median, [[median - low], [high - median]], color="#222222", linewidth=0.8, capsize=2)
        axis.set_xticks(range(len(networks)), [name.replace(", ", ",\n") for name in networks], fontsize=8)
        better = "more is better" if scenario.unit is Unit.RATE else "less is better"
        axis.set_title(f"{scenario.title}, {scenario.unit} ({better})", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    legends = [axis.get_legend_handles_labels() for axis in axes.flat]
    handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.8 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(plan: Plan, figures: Iterable[Figure], scenario: str) -> list[tuple[str, str, float, float, float]]:
    """Network, mode, median and quartiles of a scenario, in the plan's order."""
    networks = {network.name: network.title for network in plan.networks}
    modes = {mode.name: mode.title for mode in plan.modes}
    return [
        (networks[each.network], modes[each.mode], spread.median, spread.low, spread.high)
        for each in figures
        if each.scenario == scenario and (spread := each.spread) is not None
    ]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
