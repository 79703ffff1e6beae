from pathlib import Path

import pytest

from petals_core.errors import ConfigurationError
from petals_core.swarm_key import PROOF_BYTES, SwarmKey

KEY = SwarmKey(bytes(range(32)))


def test_a_key_file_holds_hexadecimal_digits(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    path.write_text(KEY.secret.hex() + "\n")
    assert SwarmKey.read(path) == KEY
    path.write_text(f"  {KEY.secret.hex().upper()}")
    assert SwarmKey.read(path) == KEY


@pytest.mark.parametrize("content", [b"", b"abcd", b"x" * 64, b"00" * 33, b"\xff" * 64, b"00" * 100_000])
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "swarm.key"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="not 64 hexadecimal digits"):
        SwarmKey.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        SwarmKey.read(tmp_path / "nowhere")


def test_a_proof_is_of_one_key_purpose_and_list_of_parts() -> None:
    proof = KEY.proof(b"hello", b"ab", b"c")
    assert len(proof) == PROOF_BYTES
    assert KEY.check(proof, b"hello", b"ab", b"c")
    assert not KEY.check(proof, b"hello", b"a", b"bc")
    assert not KEY.check(proof, b"hello", b"abc")
    assert not KEY.check(proof, b"other", b"ab", b"c")
    assert not SwarmKey.generate().check(proof, b"hello", b"ab", b"c")
    assert not KEY.check(proof[:-1], b"hello", b"ab", b"c")
    assert not KEY.check(b"", b"hello", b"ab", b"c")


def test_a_key_does_not_show_itself() -> None:
    assert KEY.secret.hex() not in repr(KEY)
    assert repr(KEY) == "SwarmKey(...)"
