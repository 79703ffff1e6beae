"""The same training without a swarm: Transformers' model on this machine, with the same matrices or prompts.

What ``--compare`` trains. There is nothing of Petals in it but the names of the parameters whose values are copied.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class PromptTwin(nn.Module):
    """A local model with trainable prompts before every row, and at every block where there are deep ones."""

    def __init__(self, base: Any, prompts: Any, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.base = base
        self.input = nn.Parameter(prompts.input.detach().clone())
        self.deep = None if prompts.deep is None else nn.Parameter(prompts.deep.detach().clone())
        if self.deep is not None:
            for index, block in enumerate(blocks):
                block.register_forward_pre_hook(self._adder(index), with_kwargs=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        """As the model's own, with virtual tokens that have no labels."""
        num_rows, num_prompts = len(input_ids), len(self.input)
        embeddings = self.base.get_input_embeddings()(input_ids)
        mask = torch.cat([attention_mask.new_ones(num_rows, num_prompts), attention_mask], dim=1)
        if labels is not None and labels.ndim == 2:
            labels = torch.cat([labels.new_full((num_rows, num_prompts), -100), labels], dim=1)
        return self.base(
            inputs_embeds=torch.cat([self.input.expand(num_rows, -1, -1), embeddings], dim=1),
            attention_mask=mask,
            labels=labels,
        )

    def _adder(self, index: int) -> Any:
        def add(block: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            assert self.deep is not None
            hidden = args[0] if args else kwargs["hidden_states"]
            count = len(self.input)
            hidden = torch.cat([hidden[:, :count] + self.deep[index], hidden[:, count:]], dim=1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return add


def prompt_twin(model: Any, auto: Any, folder: str, **settings: Any) -> PromptTwin:
    """A local model that begins with what a distributed one has to train: its prompts, and a fresh classifier."""
    base = auto.from_pretrained(folder, dtype=torch.float32, **settings).eval().requires_grad_(False)
    base.config.pad_token_id = model.config.pad_token_id
    path = model.petals_origin.block_path
    twin = PromptTwin(base, model.prompts, base.base_model.get_submodule(path))
    for name, weight in nn.Module.named_parameters(model):
        if weight.requires_grad and "tuned_prompts" not in name:
            own = base.get_parameter(name)
            own.data = copy.deepcopy(weight.data)
            own.requires_grad_(True)
    return twin


def lora_twin(model: Any, auto: Any, folder: str) -> Any:
    """PEFT on a local model, with the matrices that a distributed one has."""
    import peft

    adapter = model.tuned_adapter
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.target_modules),
        task_type="CAUSAL_LM",
    )
    twin = peft.get_peft_model(auto.from_pretrained(folder, dtype=torch.float32), config).eval()
    places = {name: weight for name, weight in twin.named_parameters() if "lora_" in name}
    for index, path, own in adapter.layers():
        for letter, matrix in (("A", own.lora_A), ("B", own.lora_B)):
            name = next(name for name in places if f".{index}.{path}.lora_{letter}.default.weight" in name)
            places[name].data = matrix.detach().clone()
    return twin
