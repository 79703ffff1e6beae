from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import MambaConfig, MiniMaxConfig, Qwen3NextConfig, T5Config, ViTConfig, Zamba2Config

from petals_core.errors import UnsupportedModelError
from petals_core.models.architecture import find_architecture
from petals_core.testing.factories import make_config


@pytest.mark.parametrize("multiplier", [12, 0.25])
def test_what_multiplies_embeddings_is_found(multiplier: float) -> None:
    architecture = find_architecture(make_config("granite", embedding_multiplier=multiplier))
    assert architecture.multipliers == ("embedding_multiplier",)


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (MambaConfig, {}, "a cache of its own kind"),
        (T5Config, {}, "encoder-decoder"),
        (
            Zamba2Config,
            {
                "layers_block_type": ["linear_attention", "hybrid"],
                "num_attention_heads": 2,
                "mamba_ngroups": 1,
                "n_mamba_heads": 4,
                "mamba_headdim": 16,
            },
            "read the embeddings again",
        ),
        (Qwen3NextConfig, {"layer_types": ["indexed_attention", "full_attention"]}, "indexed_attention"),
        (ViTConfig, {}, "can't be served"),
        (MiniMaxConfig, {"layer_types": ["linear_attention", "full_attention"]}, "uses cache of its own"),
    ],
)
def test_what_can_not_be_split_is_refused_in_one_line(config_class: Any, options: dict[str, Any], message: str) -> None:
    try:
        config = config_class(num_hidden_layers=2, hidden_size=32, **options)
    except StrictDataclassClassValidationError:
        pytest.skip(f"this version of Transformers refuses {options} itself")
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        find_architecture(config)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
