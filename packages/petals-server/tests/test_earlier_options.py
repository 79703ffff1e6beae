import pytest

from petals_server.earlier_options import normalize_arguments


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "m", "--num_blocks", "3"], ["serve", "m", "--num-blocks", "3"]),
        (["--block_indices=0:4"], ["--blocks=0:4"]),
        (
            ["--adapters", "a", "x=b/c", "--new_swarm"],
            ["--adapters", "a", "--adapters", "x=b/c", "--new-swarm"],
        ),
        (["--torch_dtype", "float32", "--new_swarm"], ["--torch-dtype", "float32", "--new-swarm"]),
        (["--public_name", "a_b"], ["--public-name", "a_b"]),
        (["--public_ip", "1.2.3.4", "--identity_path=x_y"], ["--announce-host", "1.2.3.4", "--identity=x_y"]),
        (
            ["--initial_peers", "a:1", "b:2", "[::1]:3", "--port", "0"],
            ["--initial-peers", "a:1", "--initial-peers", "b:2", "--initial-peers", "[::1]:3", "--port", "0"],
        ),
        (["--initial-peers", "a:1", "my/model"], ["--initial-peers", "a:1", "my/model"]),
        (["--initial-peers=a:1", "b:2", "model"], ["--initial-peers=a:1", "--initial-peers", "b:2", "model"]),
        (["--initial-peers", "nonsense", "model"], ["--initial-peers", "nonsense", "model"]),
        (["model", "a:1"], ["model", "a:1"]),
        (["--", "--num_blocks"], ["--", "--num_blocks"]),
    ],
)
def test_options_of_earlier_versions(arguments: list[str], expected: list[str]) -> None:
    assert normalize_arguments(arguments) == expected
