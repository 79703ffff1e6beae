"""Tensors as bytes and back: what travels beside a message's envelope.

The payload of a tensor is its elements in row-major order, little-endian. ``int8`` (the only lossy encoding besides a
narrower float, and like it never chosen unless asked for) is symmetric with one scale per token row: first the scales,
float32, one for each row (a row is everything along the last dimension), then the elements. A row that holds a NaN or
an infinity has a NaN as its scale and decodes to NaN throughout; other rows are not touched by it.

With ``zstd`` the payload is compressed over *byte planes*: byte 0 of all elements, then byte 1 of all elements, and so
on, which puts the exponents of neighbours beside each other. (``int8`` has one plane; its scales go in front as they
are.)

Every size is known from the shape before a byte is decoded, so a lie costs the receiver no memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, Literal, get_args

import torch

from petals_core.errors import ProtocolError
from petals_core.tensors import planes

WireSpec = tuple[list[int], str, str, str, int]
"""A :class:`TensorSpec` as msgpack-able values: shape, logical dtype, encoding, compression, number of bytes."""

Compression = Literal["none", "zstd"]

MAX_DIMENSIONS: Final = 8
MAX_DECODED_BYTES: Final = 1 << 31
"""Bound of one decoded tensor, unless the receiver gives a smaller one. Connections bound payloads further down."""

_SMALLEST_EXACT_SCALE: Final = 1e-30
"""Scales above this are normal float32 numbers: an element divided by its row's scale rounds to at most 127."""


class Encoding(StrEnum):
    """How elements look on the wire. The integer types besides ``int8`` carry positions and masks, never lossy."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT64 = "int64"
    INT32 = "int32"
    BOOL = "bool"


_DTYPES: Final[dict[str, torch.dtype]] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in _DTYPES.items()}
_FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
_ITEM_BYTES: Final[dict[str, int]] = {name: dtype.itemsize for name, dtype in _DTYPES.items()} | {"int8": 1}
_COMPRESSIONS: Final = frozenset(get_args(Compression))


def _is_allowed(dtype: str, encoding: str) -> bool:
    """Whether elements of logical ``dtype`` may travel as ``encoding``: floats as any float or int8, others as is."""
    if dtype in _FLOATS:
        return encoding in _FLOATS or encoding == "int8"
    return dtype == encoding and dtype in _DTYPES


def _count_rows(shape: tuple[int, ...], num_elements: int) -> int:
    if num_elements == 0:
        return 0
    return num_elements // shape[-1] if shape else 1


@lru_cache(maxsize=512)
def _payload_bytes(shape: tuple[int, ...], encoding: str) -> int:
    """Size of an uncompressed payload."""
    num_elements = math.prod(shape)
    if encoding == "int8":
        return num_elements + 4 * _count_rows(shape, num_elements)
    return num_elements * _ITEM_BYTES[encoding]


def _zstd_bound(num_bytes: int) -> int:
    """The largest that zstd makes of ``num_bytes`` (ZSTD_compressBound in zstd.h)."""
    return num_bytes + (num_bytes >> 8) + 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What a receiver must know to turn ``num_bytes`` of payload into a tensor again."""

    shape: tuple[int, ...]
    dtype: str
    """The dtype that :func:`decode` returns."""
    encoding: str
    compression: str
    num_bytes: int
    """Size of the payload on the wire, after compression."""

    def to_wire(self) -> WireSpec:
        return (list(self.shape), self.dtype, self.encoding, self.compression, self.num_bytes)

    def as_received(self) -> tuple[tuple[int, ...], str, str, str, int]:
        """What ``to_wire`` has become when it has travelled."""
        return (self.shape, self.dtype, self.encoding, self.compression, self.num_bytes)

    @classmethod
    def from_wire(cls, value: object, *, max_decoded_bytes: int = MAX_DECODED_BYTES) -> TensorSpec:
        """Check what a peer sent and return it as a spec that :func:`decode` can rely on.

        Raises:
            ProtocolError: ``value`` is not a spec, contradicts itself, or describes a tensor of more than
                ``max_decoded_bytes``.
        """
        if not isinstance(value, (list, tuple)) or len(value) != 5:
            raise ProtocolError("a tensor's description is not a list of five values")
        shape, dtype, encoding, compression, num_bytes = value
        if not isinstance(shape, (list, tuple)) or len(shape) > MAX_DIMENSIONS:
            raise ProtocolError(f"a tensor's shape is not a list of at most {MAX_DIMENSIONS} sizes")
        num_elements = 1
        size_product = 1
        for size in shape:
            if type(size) is not int or not 0 <= size <= max_decoded_bytes:
                raise ProtocolError("a tensor's shape holds something else than a reasonable size")
            num_elements *= size
            # A zero among the sizes must not hide a product that overflows what torch can express as strides.
            size_product *= size or 1
            if size_product > max_decoded_bytes:
                raise ProtocolError(f"a tensor is larger than {max_decoded_bytes} bytes")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ProtocolError("a tensor's dtype is unknown")
        if not isinstance(encoding, str) or not _is_allowed(dtype, encoding):
            raise ProtocolError(f"a tensor of {dtype} can't have the encoding that its description names")
        if not isinstance(compression, str) or compression not in _COMPRESSIONS:
            raise ProtocolError("a tensor's compression is unknown")
        if type(num_bytes) is not int or num_bytes < 0:
            raise ProtocolError("a tensor's number of bytes is not a natural number")
        shape = tuple(shape)
        payload_bytes = _payload_bytes(shape, encoding)
        if max(num_elements * _ITEM_BYTES[dtype], payload_bytes) > max_decoded_bytes:
            raise ProtocolError(f"a tensor is larger than {max_decoded_bytes} bytes")
        if compression == "none":
            if num_bytes != payload_bytes:
                raise ProtocolError(f"a tensor of {payload_bytes} bytes is said to have {num_bytes}")
        elif num_bytes > _zstd_bound(payload_bytes):
            raise ProtocolError(f"a tensor of {payload_bytes} bytes is said to have {num_bytes} when compressed")
        return cls(shape=shape, dtype=dtype, encoding=encoding, compression=compression, num_bytes=num_bytes)


def encode(
    tensor: torch.Tensor, *, encoding: Encoding | None = None, compression: Compression = "none"
) -> tuple[TensorSpec, list[memoryview]]:
    """Turn a tensor into a spec and the buffers that, one after another, are its payload.

    With ``encoding=None`` nothing is lost: the bits of every element arrive as they are. The buffers of a contiguous
    tensor in CPU memory are views of it, not copies: send them before it is written to again.

    Raises:
        ValueError: the tensor's dtype can't be sent, or not in this encoding. (Our own mistake, never a peer's.)
    """
    dtype = _NAMES.get(tensor.dtype)
    if dtype is None:
        raise ValueError(f"tensors of {tensor.dtype} can't be sent")
    wire = dtype if encoding is None else encoding.value
    if tensor.requires_grad:
        tensor = tensor.detach()
    shape = tuple(tensor.shape)
    if wire == dtype:
        payload = bytes_of(tensor)
    elif not _is_allowed(dtype, wire):
        raise ValueError(f"a tensor of {dtype} can't be sent as {wire}")
    elif wire == "int8":
        return _encode_int8(tensor, dtype, shape, compression)
    else:
        payload = bytes_of(tensor.to(_DTYPES[wire]))
    if compression == "zstd":
        payload = planes.pack(payload, _ITEM_BYTES[wire])
    spec = TensorSpec(shape=shape, dtype=dtype, encoding=wire, compression=compression, num_bytes=payload.nbytes)
    return spec, [payload]


def decode(spec: TensorSpec, buffer: memoryview | bytes | bytearray) -> torch.Tensor:
    """Turn a payload back into a contiguous CPU tensor of ``spec.shape`` and ``spec.dtype``.

    An uncompressed, aligned payload in a writable buffer is not copied: the tensor lives in ``buffer``, keeps it alive
    and must be its only user from then on.

    Raises:
        ProtocolError: the payload is not what the spec says.
    """
    view = buffer if isinstance(buffer, memoryview) else memoryview(buffer)
    if view.nbytes != spec.num_bytes:
        raise ProtocolError(f"a tensor's payload has {view.nbytes} bytes where {spec.num_bytes} were announced")
    encoding = spec.encoding
    if spec.compression == "zstd":
        view = planes.unpack(view, _ITEM_BYTES[encoding], _payload_bytes(spec.shape, encoding))
    if encoding == "int8":
        return _decode_int8(spec, view)
    if encoding == "bool":
        flags = _tensor_of(view, torch.uint8, spec.shape)
        if flags.numel() and int(flags.max()) > 1:
            raise ProtocolError("a tensor of bool holds something else than 0 and 1")
        return flags.view(torch.bool)
    tensor = _tensor_of(view, _DTYPES[encoding], spec.shape)
    return tensor if encoding == spec.dtype else tensor.to(_DTYPES[spec.dtype])


# --- bytes of a tensor ------------------------------------------------------------------------------------------------


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor in row-major order, without a copy where it is contiguous and in CPU memory."""
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    if tensor.numel() == 0:
        return memoryview(b"")
    # Viewed as int16 because NumPy has no bfloat16.
    array = (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array.data.cast("B")


def _tensor_of(view: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if view.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    if view.readonly:
        view = memoryview(bytearray(view))
    tensor = torch.frombuffer(view, dtype=dtype)
    if tensor.data_ptr() % dtype.itemsize:
        tensor = torch.frombuffer(bytearray(view), dtype=dtype)
    return tensor.view(shape)


# --- int8 with a scale per row ----------------------------------------------------------------------------------------


def _encode_int8(
    tensor: torch.Tensor, dtype: str, shape: tuple[int, ...], compression: Compression
) -> tuple[TensorSpec, list[memoryview]]:
    num_rows = _count_rows(shape, tensor.numel())
    if num_rows == 0:
        buffers = [memoryview(b"")]
    else:
        # float64 is quantized in float64 so that its range is not lost before the scale is known.
        rows = tensor.reshape(num_rows, -1).to(torch.float64 if dtype == "float64" else torch.float32)
        scales = (rows.abs().amax(dim=1, keepdim=True) / 127).to(torch.float32)  # NaN wins in amax
        smallest, largest = (float(bound) for bound in torch.aminmax(scales))
        if smallest > _SMALLEST_EXACT_SCALE and largest < math.inf:  # false if there is a NaN
            quantized = (rows / scales).round_()
        else:
            is_finite = scales.isfinite()
            scales.masked_fill_(~is_finite, math.nan)
            divisors = torch.where(is_finite & (scales > 0), scales, math.inf)  # x / inf: such rows become zeros
            quantized = (rows / divisors).nan_to_num_(0.0).round_().clamp_(-127, 127)
        buffers = [bytes_of(scales), bytes_of(quantized.to(torch.int8))]
    if compression == "zstd":
        buffers = [planes.pack(b"".join(buffers), 1)]
    num_bytes = sum(buffer.nbytes for buffer in buffers)
    return TensorSpec(shape=shape, dtype=dtype, encoding="int8", compression=compression, num_bytes=num_bytes), buffers


def _decode_int8(spec: TensorSpec, view: memoryview) -> torch.Tensor:
    dtype = _DTYPES[spec.dtype]
    num_elements = math.prod(spec.shape)
    num_rows = _count_rows(spec.shape, num_elements)
    if num_rows == 0:
        return torch.empty(spec.shape, dtype=dtype)
    scales = _tensor_of(view[: 4 * num_rows], torch.float32, (num_rows, 1))
    quantized = _tensor_of(view[4 * num_rows :], torch.int8, (num_rows, num_elements // num_rows))
    rows = quantized.to(torch.float64 if spec.dtype == "float64" else torch.float32)
    limit = torch.finfo(dtype).max
    if not float(scales.abs().max()) < limit / 128:
        # 127 * scale may round to just above the largest finite number although the row's largest element was finite.
        rows.mul_(torch.where(scales.isfinite(), scales, math.nan)).clamp_(-limit, limit)
    else:
        rows.mul_(scales)
    return rows.to(dtype).view(spec.shape)
