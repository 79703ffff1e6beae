"""What a distributed model does about training: which of its parameters train, and saving these without the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, device, dtype, nn

from petals_client import tuned_weights
from petals_client.lora import TunedAdapter
from petals_client.peft_weights import save_peft
from petals_client.tuned_weights import TuningCard
from petals_client.tuning import TunedPrompts
from petals_core.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint that a model was loaded from."""

    name: str
    fingerprint: str
    block_path: str
    """Where the base model keeps its blocks."""


class TunableModel:
    """Mixin before a model class of Transformers whose blocks are remote. Its weights are frozen when it is loaded."""

    petals_origin: Origin
    get_input_embeddings: Any

    @property
    def prompts(self) -> TunedPrompts | None:
        """The trainable prompts; None without a ``tuning_mode``."""
        assert isinstance(self, nn.Module)
        return next((module for module in self.modules() if isinstance(module, TunedPrompts)), None)

    @property
    def tuned_adapter(self) -> TunedAdapter | None:
        """The trainable low-rank matrices; None unless ``tuning_mode`` is ``"lora"``."""
        assert isinstance(self, nn.Module)
        return next((module for module in self.modules() if isinstance(module, TunedAdapter)), None)

    def add_adapter(self, *arguments: Any, **options: Any) -> None:
        """Refused: PEFT can't reach blocks that servers compute.

        Raises:
            InvalidRequestError: always.
        """
        raise InvalidRequestError(
            "servers compute the blocks, so that PEFT can't adapt them here: load the model with tuning_mode='lora' to "
            "train, or with active_adapter=NAME; peft.get_peft_model adapts the client's own layers"
        )

    load_adapter = add_adapter

    @property
    def dtype(self) -> dtype:
        """What the model computes in; prompts may be more precise."""
        embeddings: Tensor = self.get_input_embeddings().weight
        return embeddings.dtype

    @property
    def device(self) -> device:
        """Where the client's part of the model is."""
        embeddings: Tensor = self.get_input_embeddings().weight
        return embeddings.device

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """With a ``tuning_mode``: only what trains, so that optimizers get ``model.parameters()``; else all."""
        assert isinstance(self, nn.Module)
        parameters = nn.Module.named_parameters(self, prefix, recurse, remove_duplicate)
        if self.prompts is None and self.tuned_adapter is None:
            return parameters
        return ((name, weight) for name, weight in parameters if weight.requires_grad)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save what trains, and nothing else: ``from_pretrained(..., tuned=save_directory)`` loads it.

        Other options of Transformers' method mean nothing here and are ignored.

        Raises:
            InvalidRequestError: nothing trains.
        """
        assert isinstance(self, nn.Module)
        tensors: dict[str, Tensor] = {
            name: weight for name, weight in nn.Module.named_parameters(self) if weight.requires_grad
        }
        if not tensors:
            raise InvalidRequestError(
                "nothing of this model trains, and its blocks are not here, so that saving it would give a broken "
                "checkpoint: load it with tuning_mode, or set requires_grad where you train"
            )
        prompts, adapter = self.prompts, self.tuned_adapter
        card = TuningCard(
            base_model=self.petals_origin.name,
            fingerprint=self.petals_origin.fingerprint,
            model_class=type(self).__name__,
            tuning_mode="lora" if adapter is not None else None if prompts is None else prompts.mode,
            pre_seq_len=0 if prompts is None else prompts.num_tokens,
            lora=None if adapter is None else adapter.settings,
        )
        tuned_weights.save(save_directory, card, tensors)
        if adapter is not None:
            own = {id(weight) for weight in adapter.parameters()}
            save_peft(
                save_directory,
                self,
                adapter,
                {name: tensor for name, tensor in tensors.items() if id(tensor) not in own},
                block_path=self.petals_origin.block_path,
                base_model=self.petals_origin.name,
            )
        if push_to_hub:
            repo_id = kwargs.get("repo_id") or Path(save_directory).resolve().name
            self.push_to_hub(repo_id, token=kwargs.get("token"))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload trained weights",
        private: bool | None = None,
        token: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Upload what ``save_pretrained`` saves; returns the repository's address.

        Raises:
            InvalidRequestError: nothing trains. Errors of ``huggingface_hub`` come as they are.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return tuned_weights.push(folder, repo_id, token=token, private=private, message=commit_message)
