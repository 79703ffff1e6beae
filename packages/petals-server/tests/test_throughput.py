"""What was measured is remembered for the same device, blocks, dtype and software."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_server import throughput

NOW_S = 1e9


@pytest.fixture
def span(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Span:
    monkeypatch.setenv("PETALS_CACHE_DIR", str(tmp_path))
    return load_span(Checkpoint.open(str(checkpoint)), 1, 3)


def measure(span: Span, now_s: float = NOW_S, fingerprint: str = "f", num_threads: int | None = 1) -> object:
    before = torch.get_num_threads()
    try:
        return throughput.measure(span, fingerprint=fingerprint, num_threads=num_threads, now_s=now_s)
    finally:
        torch.set_num_threads(before)


def notes(folder: Path) -> list[Path]:
    return list((folder / "throughput").glob("*.json"))


def test_a_measurement_is_remembered_for_a_day(span: Span, tmp_path: Path) -> None:
    first = measure(span)
    assert measure(span, NOW_S + 3600) == first
    (note,) = notes(tmp_path)
    changed = json.loads(note.read_text()) | {"decode_tokens_per_s": 12345.0}
    note.write_text(json.dumps(changed))
    assert measure(span).decode_tokens_per_s == 12345.0  # type: ignore[attr-defined]
    for now_s in (NOW_S + throughput.MAX_AGE_S + 1, NOW_S - 1):
        note.write_text(json.dumps(changed))
        assert measure(span, now_s).decode_tokens_per_s != 12345.0  # type: ignore[attr-defined]


def test_other_conditions_are_measured_anew(span: Span, tmp_path: Path, checkpoint: Path) -> None:
    others = [span.slice(1, 2), load_span(Checkpoint.open(str(checkpoint)), 1, 3, dtype=torch.bfloat16)]
    measure(span)
    measure(span, fingerprint="g")
    measure(span, num_threads=2)
    for other in others:
        measure(other)
    assert len(notes(tmp_path)) == 5


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measured_at_s": 1e9, "decode": "many"}', "\x00"])
def test_notes_that_are_broken_are_ignored(span: Span, tmp_path: Path, content: str) -> None:
    measure(span)
    (note,) = notes(tmp_path)
    note.write_text(content)
    measure(span)
    assert json.loads(note.read_text())["decode"] == 1


def test_without_a_folder_to_write_to_it_is_measured_each_time(
    span: Span, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PETALS_CACHE_DIR", str(tmp_path / "file"))
    assert measure(span) is not None
