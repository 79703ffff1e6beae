from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.errors import ProtocolError
from petals_core.tensors.codec import Encoding, TensorSpec, decode, encode

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.bool]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def join(buffers: list[memoryview]) -> bytearray:
    return bytearray(b"".join(buffers))


def over_the_wire(spec: TensorSpec) -> TensorSpec:
    received = msgpack.unpackb(msgpack.packb(spec.to_wire()), use_list=False)
    assert received == spec.as_received()
    return TensorSpec.from_wire(received)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@given(st.sampled_from(DTYPES), SHAPES, st.sampled_from(["none", "zstd"]), st.randoms(use_true_random=False))
def test_whatever_bits_are_sent_as_computed_arrive(
    dtype: torch.dtype, shape: tuple[int, ...], compression: Any, random: Any
) -> None:
    num_bytes = math.prod(shape) * dtype.itemsize
    content = bytearray(random.randbytes(num_bytes))  # NaNs with payloads, infinities and subnormals among them
    if dtype is torch.bool:
        content = bytearray(byte & 1 for byte in content)
    tensor = torch.frombuffer(content, dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)
    spec, buffers = encode(tensor, compression=compression)
    assert sum(buffer.nbytes for buffer in buffers) == spec.num_bytes
    result = decode(over_the_wire(spec), join(buffers))
    assert (result.dtype, tuple(result.shape)) == (dtype, shape)
    assert bits(result) == bytes(content)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "needs grad"])
def test_layout_and_gradients_do_not_matter(layout: str) -> None:
    tensor = torch.randn(4, 6)
    tensor = {
        "transposed": tensor.T,
        "expanded": tensor[:, :1].expand(4, 5),
        "strided": tensor[:, ::2],
        "needs grad": tensor.clone().requires_grad_(),
    }[layout]
    spec, buffers = encode(tensor)
    result = decode(spec, join(buffers))
    assert torch.equal(result, tensor)
    assert not result.requires_grad


def test_a_contiguous_tensor_is_neither_copied_on_the_way_out_nor_on_the_way_in() -> None:
    for dtype in FLOATS:
        tensor = torch.ones(2, 3).to(dtype)
        spec, [buffer] = encode(tensor)
        tensor[1, 2] = 7.0
        arrived = bytearray(buffer)
        assert decode(spec, arrived)[1, 2] == 7.0
        result = decode(spec, memoryview(arrived))
        arrived[:] = bytes(len(arrived))
        assert not result.any()


def test_read_only_and_unaligned_buffers_are_copied() -> None:
    tensor = torch.randn(3, 5)
    spec, buffers = encode(tensor)
    payload = bytes(join(buffers))
    assert torch.equal(decode(spec, payload), tensor)
    for offset in range(1, 8):
        shifted = bytearray(offset) + payload
        assert torch.equal(decode(spec, memoryview(shifted)[offset:]), tensor)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("encoding", [Encoding.FLOAT16, Encoding.BFLOAT16, Encoding.FLOAT32])
def test_a_narrower_float_is_what_a_cast_gives(dtype: torch.dtype, encoding: Encoding) -> None:
    tensor = torch.randn(2, 9).to(dtype)
    spec, buffers = encode(tensor, encoding=encoding, compression="zstd")
    expected = tensor.to(getattr(torch, encoding.value)).to(dtype)
    assert torch.equal(decode(over_the_wire(spec), join(buffers)), expected)


finite_rows = st.lists(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=7, max_size=7), min_size=1, max_size=4
)


@given(finite_rows, st.sampled_from(FLOATS), st.sampled_from(["none", "zstd"]))
def test_int8_is_within_half_a_step_of_each_row(rows: list[list[float]], dtype: torch.dtype, compression: Any) -> None:
    tensor = torch.tensor(rows, dtype=torch.float64).to(dtype)
    tensor = tensor.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    spec, buffers = encode(tensor, encoding=Encoding.INT8, compression=compression)
    result = decode(over_the_wire(spec), join(buffers))
    assert result.dtype == dtype
    # Half a step, what the result's own dtype rounds off, and the smallest scale that float32 has.
    largest = tensor.double().abs().amax(dim=1, keepdim=True)
    bound = largest / 127 * 0.5 * (1 + 1e-5) + largest * torch.finfo(dtype).eps + 127 * 2**-149
    bound += torch.finfo(dtype).tiny if dtype is torch.float16 else 0.0
    assert ((result.double() - tensor.double()).abs() <= bound).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_carries_what_is_not_finite_as_nan_and_keeps_it_in_its_row(poison: float, dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 3, 8).to(dtype)
    clean = decode_int8(tensor)
    tensor[0, 1, 4] = poison
    result = decode_int8(tensor)
    assert result[0, 1].isnan().all()
    result[0, 1] = clean[0, 1]
    assert torch.equal(result, clean)


def decode_int8(tensor: torch.Tensor) -> torch.Tensor:
    spec, buffers = encode(tensor, encoding=Encoding.INT8)
    return decode(over_the_wire(spec), join(buffers))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1,)])
def test_int8_of_odd_shapes(shape: tuple[int, ...]) -> None:
    tensor = torch.full(shape, -2.0)
    assert torch.equal(decode_int8(tensor), tensor)


def test_int8_with_a_scale_of_infinity_from_a_peer_gives_nan() -> None:
    spec, buffers = encode(torch.ones(1, 4), encoding=Encoding.INT8)
    payload = join(buffers)
    payload[:4] = np.array([math.inf], dtype="<f4").tobytes()
    assert decode(spec, payload).isnan().all()


def test_zstd_over_planes_shrinks_hidden_states() -> None:
    tensor = torch.randn(64, 256).to(torch.bfloat16)
    spec, _ = encode(tensor, compression="zstd")
    assert spec.num_bytes < 0.8 * tensor.nbytes


def test_our_own_mistakes_are_value_errors() -> None:
    with pytest.raises(ValueError, match="can't be sent"):
        encode(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="can't be sent as int8"):
        encode(torch.zeros(2, dtype=torch.int64), encoding=Encoding.INT8)


wire_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
nearly_specs = st.tuples(
    st.lists(st.integers(-1, 2**40) | st.integers(0, 4) | st.booleans() | st.floats(), max_size=10),
    st.sampled_from(["float32", "bfloat16", "int64", "bool", "int8", "float8", ""]),
    st.sampled_from([*Encoding, "uint8"]),
    st.sampled_from(["none", "zstd", "gzip"]),
    st.integers(-1, 600),
)


@settings(max_examples=300)
@given(wire_values | nearly_specs, st.binary(max_size=64))
def test_garbage_raises_protocol_errors_only(value: object, payload: bytes) -> None:
    try:
        spec = TensorSpec.from_wire(value, max_decoded_bytes=1 << 20)
        decode(spec, payload)
    except ProtocolError:
        pass


@settings(max_examples=200)
@given(st.sampled_from([None, Encoding.INT8]), st.data())
def test_damaged_payloads_raise_protocol_errors_or_decode_to_the_announced_shape(
    encoding: Encoding | None, data: st.DataObject
) -> None:
    spec, buffers = encode(torch.linspace(-1, 1, 60).view(3, 20), encoding=encoding, compression="zstd")
    payload = join(buffers)
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        result = decode(spec, payload)
    except ProtocolError:
        return
    assert result.shape == (3, 20)


@pytest.mark.parametrize(
    "value",
    [
        ([2**20, 2**20], "float32", "float32", "none", 2**42),
        ([0, 2**31, 2**31, 2**31], "float32", "float32", "none", 0),
        ([1] * 9, "float32", "float32", "none", 4),
        ([True], "float32", "float32", "none", 4),
        ([4], "float32", "float32", "none", 15),
        ([4], "float32", "float32", "zstd", 100_000),
        ([4], "int64", "float32", "none", 16),
        ([4], "float32", "int64", "none", 32),
        ([4], "int8", "int8", "none", 8),
        ([4], "float32", ["float32"], "none", 16),
    ],
)
def test_lies_about_sizes_and_types_are_refused(value: object) -> None:
    with pytest.raises(ProtocolError):
        TensorSpec.from_wire(value)


def test_a_decompression_bomb_is_refused_by_its_size() -> None:
    spec, [bomb] = encode(torch.zeros(1 << 20), compression="zstd")
    lie = TensorSpec.from_wire(([4], "float32", "float32", "zstd", spec.num_bytes))
    with pytest.raises(ProtocolError, match="another size"):
        decode(lie, bomb)


def test_a_bool_of_two_is_refused() -> None:
    spec, _ = encode(torch.tensor([True, False]))
    with pytest.raises(ProtocolError, match="0 and 1"):
        decode(spec, b"\x02\x00")
