"""Tiny models with random weights, written as Transformers writes real ones.

Weights are random but not meaningless: of a size that keeps hidden states in order and makes greedy continuations
wander over the vocabulary, so that a test which compares tokens compares something.
"""

from __future__ import annotations

import inspect
import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

import torch

_EXPERTS: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA: Final = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 4}
_GRANITE: Final = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 1.7,
    "logits_scaling": 0.6,
    "residual_multiplier": 0.8,
}
_UNTIED: Final = {"tie_word_embeddings": False}

_SPECIAL: Final[dict[str, dict[str, Any]]] = {
    "bamba": {"attn_layer_indices": [1, 4], **_MAMBA},
    "bloom": {},
    "cohere": {},
    "deepseek_v3": {
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "n_group": 2,
        "n_routed_experts": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "topk_group": 1,
        "v_head_dim": 16,
        **_EXPERTS,
    },
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": {"embedding_multiplier": 1.7, "mamba_d_ssm": None, **_MAMBA},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 6},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 6, "sliding_window_pattern": 3},
    "glm4": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {"sliding_window": 6, **_LOCAL_EXPERTS},
    "gptj": {"rotary_dim": 8},
    "granite": _GRANITE,
    "granitemoehybrid": {
        "layer_types": ("linear_attention", "full_attention"),
        "position_embedding_type": "rope",
        "shared_intermediate_size": 64,
        **_GRANITE,
        **_LOCAL_EXPERTS,
        **_MAMBA,
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 3,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "num_experts": 4,
    },
    "lfm2": {"layer_types": ("conv", "full_attention", "conv")},
    "llama": _UNTIED,
    "llama4_text": {
        "attention_chunk_size": 8,
        "floor_scale": 4,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "no_rope_layers": (1, 0, 1),
        "num_local_experts": 4,
    },
    "mistral": {"sliding_window": 6},
    "mixtral": _LOCAL_EXPERTS,
    "mpt": {},
    "nemotron_h": {
        "chunk_size": 4,
        "layers_block_type": ("mamba", "attention", "mlp"),
        "mamba_head_dim": 16,
        "mamba_num_heads": 4,
        "n_groups": 2,
        "ssm_state_size": 8,
    },
    "olmo2": _UNTIED,
    "olmo_hybrid": {
        "layer_types": ("linear_attention", "linear_attention", "full_attention"),
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
    },
    "opt": {},
    "phi": {},
    "phi3": _UNTIED,
    "qwen2": _UNTIED,
    "qwen3": _UNTIED,
    "qwen3_moe": _EXPERTS,
    "qwen3_5_text": {
        "layer_types": ("linear_attention", "linear_attention", "full_attention"),
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
    },
    "qwen3_next": {
        "layer_types": ("linear_attention", "linear_attention", "full_attention"),
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 32,
        **_EXPERTS,
    },
    "smollm3": {"no_rope_layers": (1, 1, 0), **_UNTIED},
    "stablelm": {},
    "starcoder2": {"sliding_window": 6},
}
"""What a family's config needs besides the sizes that all have: small, and with what is special about the family on.

Windows and chunks are shorter than the prompts of tests, multipliers are not 1, and kinds of blocks do not alternate
evenly, so that a span which took itself for another would show. Tuples are patterns, repeated for all blocks.
"""

_VARIANTS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "falcon_alibi": ("falcon", {"alibi": True, "bias": True}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_new_alibi": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": True}),
}
"""Kinds of one family that compute differently enough to be tested apart."""

FAMILIES: Final = (*_SPECIAL, *_VARIANTS)
"""What :func:`make_config` can make."""

VOCABULARY: Final = 320
"""256 bytes, three special tokens, and some that no text has."""


def make_config(family: str, *, num_blocks: int = 6, hidden_size: int = 64, **overrides: Any) -> Any:
    """A config of the family with small sizes; ``overrides`` in the family's own words win.

    Raises:
        ValueError: the family is none of ``FAMILIES``.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no factory for {family}: use one of {', '.join(FAMILIES)}")
    from transformers import CONFIG_MAPPING

    num_heads = 4
    general = {
        "num_hidden_layers": num_blocks,
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // num_heads,
        "intermediate_size": 2 * hidden_size,
        "ffn_dim": 2 * hidden_size,
        "max_position_embeddings": 512,
        "max_seq_len": 512,
        "vocab_size": VOCABULARY,
    }
    model_type, special = _VARIANTS.get(family, (family, _SPECIAL.get(family, {})))
    config_class = CONFIG_MAPPING[model_type]
    known = inspect.signature(config_class.__init__).parameters
    names = {name: config_class.attribute_map.get(name, name) for name in general}
    sizes: dict[str, Any] = {names[name]: value for name, value in general.items() if names[name] in known}
    for name, value in special.items():
        sizes[name] = list(islice(cycle(value), num_blocks)) if isinstance(value, tuple) else value
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return config_class(**(tokens | sizes | overrides))


def make_checkpoint(
    folder: str | Path,
    family: str = "llama",
    *,
    num_blocks: int = 6,
    hidden_size: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "50GB",
    **overrides: Any,
) -> Path:
    """Write a random causal language model and a tokenizer of bytes into ``folder``, and return its path.

    The same arguments give the same weights. With a ``max_shard_size`` (bytes, or as Transformers has it) below the
    model's size there are several safetensors files and an index.
    """
    config = make_config(family, num_blocks=num_blocks, hidden_size=hidden_size, **overrides)
    return write_checkpoint(folder, config, seed=seed, dtype=dtype, max_shard_size=max_shard_size)


def bench_model(folder: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A llama of 12 blocks of width 1,024 (8 heads, 4 for keys, MLP 2,816, vocabulary 8,192): 590 MB in float32."""
    return make_checkpoint(
        folder,
        num_blocks=12,
        hidden_size=1024,
        seed=seed,
        dtype=dtype,
        max_shard_size="100MB",
        num_attention_heads=8,
        head_dim=128,
        num_key_value_heads=4,
        intermediate_size=2816,
        vocab_size=8192,
        max_position_embeddings=4096,
    )


def thin_model(folder: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A llama with wide hidden states and next to no computation: what is left of a step's time is the software's."""
    return make_checkpoint(
        folder,
        num_blocks=12,
        hidden_size=1024,
        seed=seed,
        dtype=dtype,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=16,
        max_position_embeddings=4096,
    )


def write_checkpoint(
    folder: str | Path,
    config: Any,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write a random causal language model of any config, with a tokenizer of bytes."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    has_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.to_empty(device="cpu")
        fill_weights(model, seed)
        # What is marked is left alone: only the buffers get the values that nobody but the family knows.
        for weight in model.parameters():
            weight._is_hf_initialized = True
        model.init_weights()
        model.tie_weights()
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        if has_bar:
            logging.enable_progress_bar()
    write_tokenizer(folder)
    return Path(folder)


_NORMS_LESS_ONE: Final = ("Gemma", "Qwen3Next", "Qwen3_5")
"""Families that store the weights of their norms less one."""


def fill_weights(model: torch.nn.Module, seed: int) -> None:
    """Overwrite all weights with values that depend on nothing but their order, shapes and ``seed``.

    Uniform, because that takes half the time of normal.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean = 0.0
            if weight.ndim < 2:
                deviation = 0.05
                if name.endswith("A_log"):
                    mean = -1.5  # recurrent states fade slowly: a decay of 0.8 or so
                elif not name.endswith("bias") and not type(model).__name__.startswith(_NORMS_LESS_ONE):
                    mean = 0.1 if "emb" in name else 1.0  # norms
            elif "emb" in name or "wte" in name or "wpe" in name:
                deviation = 0.03
            else:  # variance grows a little in each layer, however wide; experts are stacked along the first dimension
                deviation = 1.5 * weight.shape[-1] ** -0.5
            half_width = deviation * 3**0.5
            weight.uniform_(mean - half_width, mean + half_width, generator=generator)


def apply_caps(local: Any) -> Any:
    """Have a local model cap attention's scores as its config says, which Transformers 5.17 forgets, and return it."""
    if getattr(local.config, "attn_logit_softcapping", None) is not None:
        local.set_attn_implementation("eager")
    return local


def write_tokenizer(folder: str | Path) -> None:
    """A tokenizer of bytes: tokens 0 to 2 are ``<pad>``, ``<s>`` and ``</s>``, then come the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    fast.padding_side = "left"
    fast.save_pretrained(folder)


def edit_config(folder: str | Path, **changes: Any) -> None:
    """Change a written checkpoint's config; a value of None removes the key."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config |= changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
