import pytest
import torch

from petals_core.errors import DeviceError
from petals_core.models.devices import check_device


def test_devices_that_are_not_here_or_can_not_compute() -> None:
    for device in ("cuda:99", "nonesuch"):
        with pytest.raises(DeviceError, match="there is no device") as raised:
            check_device(device, torch.float32)
        assert "\n" not in str(raised.value)
    with pytest.raises(DeviceError, match="cpu can't compute in float8_e4m3fn") as raised:
        check_device("cpu", torch.float8_e4m3fn)
    assert "\n" not in str(raised.value)
    assert check_device("cpu", torch.bfloat16) == torch.device("cpu")
