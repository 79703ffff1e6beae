"""Train a smaller model to say what a trained one says: on the same text, and on what that one writes itself.

A draft is worth as much as the model agrees with it, on the model's own continuations: so the small model learns the
distributions of the large one and not the text (Zhou et al., "DistillSpec: Improving Speculative Decoding via Knowledge
Distillation", 2023). It begins as the large one's embedding, norm, first and last blocks.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from demo_model.optimizer import Optimizer
from demo_model.training import Budget, Report, Rows, learning_scale, row_tokens

Tokens = npt.NDArray[np.int64]

ROWS_AT_ONCE = 128
PROMPT_TOKENS = (8, 16, 32, 64)
WRITTEN_TOKENS = 192


def new_draft_model(teacher: LlamaForCausalLM, *, num_blocks: int, intermediate_size: int) -> LlamaForCausalLM:
    """Return a model of fewer and narrower blocks than the teacher's, and the same embedding.

    Blocks are taken evenly from the first to the last, and of their feed-forward units those that write most.
    """
    config = copy.deepcopy(teacher.config)
    last = config.num_hidden_layers - 1
    taken = [round(index * last / max(1, num_blocks - 1)) for index in range(num_blocks)]
    config.num_hidden_layers, config.intermediate_size = num_blocks, intermediate_size
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(teacher.model.norm.state_dict())
    for block, source in zip(model.model.layers, taken, strict=True):
        weights = teacher.model.layers[source].state_dict()
        units = weights["mlp.down_proj.weight"].norm(dim=0).topk(intermediate_size).indices.sort().values
        weights["mlp.down_proj.weight"] = weights["mlp.down_proj.weight"][:, units]
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            weights[name] = weights[name][units]
        block.load_state_dict(weights)
    return model


def written(teacher: LlamaForCausalLM, documents: Sequence[Tokens], *, num_batches: int, seed: int) -> Iterator[Tokens]:
    """Yield pieces of documents with what the teacher writes after them: greedily, and each fourth batch by sampling.

    Every other batch of pieces is from the beginnings of documents.
    """
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    for index in range(num_batches):
        length = PROMPT_TOKENS[index // 8 % len(PROMPT_TOKENS)]
        long_enough = [document for document in documents if len(document) > length]
        chosen = [long_enough[each] for each in random.integers(len(long_enough), size=ROWS_AT_ONCE)]
        starts = [0 if index % 2 else int(random.integers(len(document) - length)) for document in chosen]
        pieces = [document[start : start + length] for document, start in zip(chosen, starts, strict=True)]
        prompts = torch.from_numpy(np.stack(pieces))
        rows = teacher.generate(  # type: ignore[misc]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=WRITTEN_TOKENS,
            **({"do_sample": True, "top_k": 0} if index % 4 == 3 else {"do_sample": False}),
        )
        end = teacher.config.eos_token_id
        assert isinstance(rows, Tensor)
        for row in rows.numpy():
            ends = np.flatnonzero(row[length:] == end)
            yield row[: length + int(ends[0]) + 1] if len(ends) else row


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of what a draft loses by logits [N, vocabulary] of both.

    The divergence of the distributions; their distance in total variation, the share of sampled drafts that is rejected
    (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023, corollary 3.6); and what the
    teacher's likeliest token costs, which is what greedy drafts are compared with.
    """
    wanted = teacher.softmax(dim=-1)
    found = student.log_softmax(dim=-1)
    distance = (wanted - found.exp()).abs().sum(dim=-1) / 2
    likeliest = torch.nn.functional.nll_loss(found, teacher.argmax(dim=-1))
    return torch.nn.functional.kl_div(found, wanted, reduction="batchmean") + distance.mean() + likeliest / 2


def distil(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, documents: Sequence[Tokens], budget: Budget, *, seed: int
) -> Iterator[Report]:
    """Train the student in place, yielding a report after every step; stop asking for reports to stop early."""
    student.train()
    optimizer = Optimizer(dict(student.named_parameters()))
    rows = Rows(documents, seed)
    started, loss_sum, weight = time.monotonic(), 0.0, 0.0
    for step in range(budget.num_steps):
        progress = budget.progress(step, time.monotonic() - started)
        if progress >= 1:
            break
        inputs = rows.batch(row_tokens(progress))[:, :-1].contiguous()
        with torch.no_grad():
            wanted = teacher(inputs, use_cache=False).logits.flatten(0, 1)
        loss = distillation_loss(student(inputs, use_cache=False).logits.flatten(0, 1), wanted)
        loss.backward()
        optimizer.update(step=step, scale=learning_scale(step, progress))
        loss_sum, weight = 0.98 * loss_sum + loss.item(), 0.98 * weight + 1
        yield Report(step=step + 1, progress=progress, loss=loss_sum / weight)


@torch.inference_mode()
def tokens_per_trip(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    documents: Sequence[Tokens],
    *,
    num_drafts: int,
    num_seconds: int = 0,
) -> float:
    """Return how many tokens of the teacher's greedy continuations a check of so many drafts gives, on average.

    Drafts are good up to the first that differs, and until then both models have the same tokens before them: so one
    forward of the student over a finished continuation says what it would have drafted everywhere. With
    ``num_seconds`` the drafts are a tree: beside each of the first so many the second choice is checked too.
    """
    student.train(False)
    num_tokens = num_trips = 0
    length = PROMPT_TOKENS[1]
    prompts = torch.from_numpy(np.stack([each[:length] for each in documents if len(each) > length]))
    rows = teacher.generate(  # type: ignore[misc]
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=WRITTEN_TOKENS
    )
    first, second = student(rows, use_cache=False).logits[:, length - 1 : -1].topk(2, dim=-1).indices.unbind(dim=-1)
    said = rows[:, length:]
    found = zip((first == said).tolist(), (second == said).tolist(), said.tolist(), strict=True)
    for agrees, agrees_second, row in found:
        size = row.index(teacher.config.eos_token_id) + 1 if teacher.config.eos_token_id in row else len(row)
        place = 0
        while place < size:
            accepted = 0
            while accepted < num_drafts and place + accepted < size and agrees[place + accepted]:
                accepted += 1
            if accepted < num_seconds and place + accepted < size and agrees_second[place + accepted]:
                accepted += 1
            place += accepted + 1
            num_trips += 1
        num_tokens += size
    student.train(True)
    return num_tokens / num_trips
