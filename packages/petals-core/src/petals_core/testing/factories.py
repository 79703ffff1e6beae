"""Tiny models with random weights, written as Transformers writes real ones.

Weights are random but not meaningless: of a size that keeps hidden states in order and makes greedy continuations
wander over the vocabulary, so that a test which compares tokens compares something.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch

FAMILIES: Final = (
    "llama",
    "bloom",
    "mixtral",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gpt2",
    "opt",
    "falcon",
    "gpt_neox",
    "phi3",
    "olmo2",
    "gptj",
    "mpt",
)
"""What :func:`make_config` can make; all of them can be split."""

VOCABULARY: Final = 320
"""256 bytes, three special tokens, and some that no text has."""


def make_config(family: str, *, num_blocks: int = 6, hidden_size: int = 64, **overrides: Any) -> Any:
    """A config of the family with small sizes; ``overrides`` in the family's own words win.

    Raises:
        ValueError: the family is none of ``FAMILIES``.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no factory for {family}: use one of {', '.join(FAMILIES)}")
    from transformers import AutoConfig

    num_heads = 4
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "bloom":
        sizes: dict[str, Any] = {"n_layer": num_blocks, "hidden_size": hidden_size, "n_head": num_heads}
    elif family == "gpt2":
        sizes = {"n_layer": num_blocks, "n_embd": hidden_size, "n_head": num_heads, "n_positions": 512}
    elif family == "gptj":
        sizes = {"n_layer": num_blocks, "n_embd": hidden_size, "n_head": num_heads, "n_positions": 512, "rotary_dim": 8}
    elif family == "mpt":
        sizes = {"n_layers": num_blocks, "d_model": hidden_size, "n_heads": num_heads, "max_seq_len": 512}
    else:
        sizes = {
            "num_hidden_layers": num_blocks,
            "hidden_size": hidden_size,
            "num_attention_heads": num_heads,
            "max_position_embeddings": 512,
        }
    if family in ("llama", "mixtral", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "phi3", "olmo2"):
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 2 * hidden_size}
    match family:
        case "llama" | "olmo2" | "phi3" | "qwen2":
            sizes |= {"tie_word_embeddings": False}
        case "mistral":
            sizes |= {"sliding_window": 6}
        case "mixtral":
            sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
        case "qwen3":
            sizes |= {"head_dim": hidden_size // num_heads, "tie_word_embeddings": False}
        case "qwen3_moe":
            sizes |= {
                "head_dim": hidden_size // num_heads,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": hidden_size,
            }
        case "gemma":
            sizes |= {"head_dim": hidden_size // num_heads}
        case "gemma2":
            sizes |= {
                "head_dim": hidden_size // num_heads,
                "query_pre_attn_scalar": hidden_size // num_heads,
                "sliding_window": 6,
            }
        case "opt":
            sizes |= {"ffn_dim": 2 * hidden_size, "word_embed_proj_dim": hidden_size}
        case "gpt_neox":
            sizes |= {"intermediate_size": 2 * hidden_size}
        case "falcon":
            sizes |= {"new_decoder_architecture": False, "multi_query": True}
        case _:
            pass
    return AutoConfig.for_model(family, **(shared | sizes | overrides))


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
                if not name.endswith("bias") and "Gemma" not in type(model).__name__:
                    mean = 0.1 if "emb" in name else 1.0  # norms; gemma's are stored less one
            elif "emb" in name or "wte" in name or "wpe" in name:
                deviation = 0.03
            else:  # variance grows a little in each layer, however wide; experts are stacked along the first dimension
                deviation = 1.5 * weight.shape[-1] ** -0.5
            half_width = deviation * 3**0.5
            weight.uniform_(mean - half_width, mean + half_width, generator=generator)


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


def checkpoint_bytes(folder: str | Path) -> int:
    """Size of a checkpoint's safetensors files."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def edit_config(folder: str | Path, **changes: Any) -> None:
    """Change a written checkpoint's config; a value of None removes the key."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config |= changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
