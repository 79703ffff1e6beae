"""The notebook form of the examples: ``python3 tools/notebooks.py`` writes ``examples/*.ipynb`` from the scripts.

A script's cells begin with ``# %%``, those of text with ``# %% [markdown]``; notebooks hold them and no outputs. With
``--check`` nothing is written, and the exit code tells whether all notebooks are those of their scripts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MARK = "# %%"
TEXT = f"{MARK} [markdown]"


def cells(script: str) -> list[tuple[str, str]]:
    """The kind (``markdown`` or ``code``) and the text of each cell of a script."""
    found: list[tuple[str, list[str]]] = []
    for line in script.splitlines():
        if line.startswith(MARK):
            found.append(("markdown" if line == TEXT else "code", []))
        elif found:
            found[-1][1].append(line)
    result = []
    for kind, lines in found:
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        result.append((kind, "\n".join(lines).strip("\n")))
    return result


def notebook(script: str) -> dict[str, Any]:
    """A notebook in the form that Jupyter reads: version 4.5, https://nbformat.readthedocs.io."""
    made: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells(script)):
        cell: dict[str, Any] = {
            "cell_type": kind,
            "id": f"cell-{number}",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": made,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def scripts() -> list[Path]:
    """The examples that have cells."""
    return [path for path in sorted(EXAMPLES.glob("*.py")) if path.read_text().startswith(MARK)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a notebook is out of date")
    is_check = parser.parse_args().check
    stale = []
    for path in scripts():
        text = json.dumps(notebook(path.read_text()), indent=1, ensure_ascii=False) + "\n"
        target = path.with_suffix(".ipynb")
        if target.exists() and target.read_text() == text:
            continue
        stale.append(target.name)
        if not is_check:
            target.write_text(text)
    print(f"{'out of date' if is_check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if stale and is_check else 0


if __name__ == "__main__":
    sys.exit(main())
