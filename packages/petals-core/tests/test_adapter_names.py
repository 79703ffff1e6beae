"""Names of adapters."""

from __future__ import annotations

import pytest

from petals_core.adapter_names import find_meant, is_meant, name_adapter
from petals_core.errors import ConfigurationError


def test_a_name_is_meant_alone_or_whole() -> None:
    whole = name_adapter("owner/poems", "0123abcd", where="there")
    assert whole == "owner/poems@0123abcd"
    assert is_meant("owner/poems", whole)
    assert is_meant(whole, whole)
    assert not is_meant("poems", whole)
    assert not is_meant("owner/poems@00000000", whole)
    assert not is_meant("anything", "anything")  # an announcement that is not one of ours


def test_several_may_be_meant() -> None:
    announced = ["a@11111111", "a@22222222", "a@11111111", "b@11111111"]
    assert find_meant("a", announced) == ("a@11111111", "a@22222222")
    assert find_meant("a@22222222", announced) == ("a@22222222",)
    assert find_meant("c", announced) == ()


@pytest.mark.parametrize("name", ["", "a b", "a@b", "x" * 49, "a/b/c", "a=b"])
def test_names_that_can_not_be(name: str) -> None:
    with pytest.raises(ConfigurationError, match="NAME=PATH"):
        name_adapter(name, "01234567", where="there")
