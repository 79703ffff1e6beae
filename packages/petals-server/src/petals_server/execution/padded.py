"""Sessions of models whose attention can't be replaced: their rows go through the span as a padded batch.

The model's own attention gets, from a cache that stands for the pages, each row's keys and values with pads to their
left. Rows with equally many new tokens go together, so that no pad is computed but those that masks hide.

Letters: R rows, N new tokens of each, P columns before them, C = P + N, T = R * N; G heads of keys, D their width, H
hidden size, S slots of a pool.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from petals_core.models.span import Span
from petals_core.models.transformers_caches import new_exchange_cache
from petals_server.execution.batch import Batch, row_slots
from petals_server.execution.changes import RowChange, changed
from petals_server.execution.states import as_mask
from petals_server.scheduling.plan import RowPart


def compute_padded(
    span: Span,
    batch: Batch,
    hidden_TH: torch.Tensor,
    positions_T: NDArray[np.int64],
    changes: Sequence[RowChange],
) -> torch.Tensor:
    """A batch's tokens through the span; returns [T, H]."""
    rows = batch.rows
    starts = np.cumsum([0, *(row.count for row in rows)]).tolist()
    if len({row.count for row in rows}) == 1:
        return _compute(span, batch, hidden_TH, positions_T, rows, changes)
    output_TH = torch.empty_like(hidden_TH)
    for count in sorted({row.count for row in rows}):
        chosen = [index for index, row in enumerate(rows) if row.count == count]
        tokens = np.concatenate([np.arange(starts[index], starts[index] + count) for index in chosen])
        places = torch.from_numpy(tokens).to(hidden_TH.device)
        chosen_changes = [changes[index] for index in chosen]
        chosen_rows = [rows[index] for index in chosen]
        computed_TH = _compute(
            span, batch, hidden_TH.index_select(0, places), positions_T[tokens], chosen_rows, chosen_changes
        )
        output_TH.index_copy_(0, places, computed_TH)
    return output_TH


def _compute(
    span: Span,
    batch: Batch,
    hidden_TH: torch.Tensor,
    positions_T: NDArray[np.int64],
    rows: Sequence[RowPart],
    changes: Sequence[RowChange],
) -> torch.Tensor:
    """Rows with equally many tokens."""
    cache = batch.cache
    num_rows, count = len(rows), rows[0].count
    hidden_RNH = hidden_TH.view(num_rows, count, -1)
    positions_RN = positions_T.reshape(num_rows, count)
    past = max(row.past for row in rows)
    device = hidden_TH.device
    slots_RC = np.zeros((num_rows, past + count), dtype=np.int64)  # slot 0 is in the page that nobody writes
    for index, row in enumerate(rows):
        slots_RC[index, past - row.past :] = row_slots(row.runs[0], 0, row.past + count, cache.page_tokens)
    new_slots = torch.from_numpy(slots_RC[:, past:].reshape(-1)).to(device)
    all_slots: slice | torch.Tensor
    if num_rows == 1 and rows[0].runs[0].is_consecutive:
        all_slots = slice(int(slots_RC[0, 0]), int(slots_RC[0, 0]) + past + count)
    else:
        all_slots = torch.from_numpy(slots_RC.reshape(-1)).to(device)

    def exchange(layer: int, keys_RGND: torch.Tensor, values_RGND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layer += batch.first_layer
        fetched = []
        for new_RGND, pool_SGD in ((keys_RGND, cache.keys_SGD[layer]), (values_RGND, cache.values_SGD[layer])):
            pool_SGD.index_copy_(0, new_slots, new_RGND.transpose(1, 2).reshape(-1, *pool_SGD.shape[1:]))
            found = pool_SGD[all_slots] if isinstance(all_slots, slice) else pool_SGD.index_select(0, all_slots)
            fetched.append(found.view(num_rows, past + count, *pool_SGD.shape[1:]).transpose(1, 2))
        return fetched[0], fetched[1]

    is_even = all(row.past == past for row in rows)
    is_plain = is_even and bool((positions_RN == past + np.arange(count)).all())
    valid_RC = np.arange(past + count) >= np.array([[past - row.past] for row in rows])
    with changed(span, rows, changes):
        output_RNH = span(
            hidden_RNH,
            attention_mask=None if is_plain else as_mask(valid_RC, device),
            position_ids=None if is_plain else torch.from_numpy(positions_RN).to(device),
            cache=new_exchange_cache(past, exchange),
        )
    return output_RNH.reshape(num_rows * count, -1)
