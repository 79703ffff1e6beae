"""What a client can't be told."""

from __future__ import annotations

from typing import Any

import pytest

from petals_client import ClientOptions
from petals_core.errors import ConfigurationError


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"step_timeout_s": 0.0}, "step_timeout_s 0.0 is not between 0.001 and 3600 seconds"),
        ({"open_timeout_s": 7200.0}, "open_timeout_s 7200.0 is not between"),
        ({"connect_timeout_s": float("nan")}, "connect_timeout_s nan is not between"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens is 0: give at least 1"),
        ({"compression": "gzip"}, "'gzip' is none of auto, none, zstd"),
        ({"activation_codec": "int4"}, "'int4' is none of float32, float16, bfloat16, int8"),
    ],
)
def test_settings_that_can_not_be(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ClientOptions.make(initial_peers=["127.0.0.1:31330"], **setting)
