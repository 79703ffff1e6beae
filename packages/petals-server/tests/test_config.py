import pytest

from petals_core.errors import ConfigurationError
from petals_server.config import ServerConfig, parse_blocks


def test_blocks_are_read() -> None:
    assert parse_blocks("0:4") == (0, 4)


@pytest.mark.parametrize("text", ["", "4", "0-4", "a:b", "-1:3", "1:2:3", "0x1:2", "²:3", "1:" + "9" * 5000])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--blocks"):
        parse_blocks(text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"blocks": (4, 4)}, "4:4 are not a span"),
        ({"blocks": (0, 4), "num_blocks": 4}, "exclude each other"),
        ({"num_blocks": 0}, "--num-blocks 0"),
        ({"port": 65536}, "--port 65536"),
        ({"torch_dtype": "int8"}, "--torch-dtype int8 is none of auto"),
        ({"host": "not a host"}, "--host 'not a host'"),
        ({"announce_host": "0.0.0.0"}, "nobody can connect to a wildcard"),
        ({"public_name": "two\nlines"}, "--public-name"),
        ({"public_name": "x" * 129}, "--public-name"),
        ({"cache_tokens": 0}, "--attn-cache-tokens"),
        ({"num_threads": 0}, "--threads"),
    ],
)
def test_configurations_that_contradict_themselves(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        ServerConfig(model="m", **changes)  # type: ignore[arg-type]
