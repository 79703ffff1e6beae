"""Whether a tensor's bytes are compressed before they are sent: if they arrive earlier that way.

Raw bytes arrive after ``n / rate``; compressed ones after the time to compress and decompress them, and ``share * n /
rate``. The link's rate, the speed of compression and the share that is left are measured as they come. Where nothing
ever had to wait, the rate is not known and not what limits: bytes go raw. Lossy encodings are for those who ask for
them by name, and only where they arrive earlier too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, get_args

Mode = Literal["auto", "none", "zstd"]
MODES: Final[tuple[str, ...]] = get_args(Mode)

MIN_BYTES: Final = 8 * 1024
"""Less is never compressed: that is what a few tokens take, and they are waited for."""
SAMPLE_BYTES: Final = 64 * 1024
_SAMPLE_EVERY: Final = 16
"""Payloads of a kind after which one is tried on a small part, in case what is left of them has changed."""
_WEIGHT: Final = 0.25
"""Of a new measurement."""
_PRICE_S: Final = 2e-9
"""Seconds per byte to compress, before it was measured; 0.7 to 2 GB/s on one core."""
_UNPACK_SHARE: Final = 0.7
"""What decompressing takes of the time of compressing."""
_SHARES: Final = {"bfloat16": 0.7, "int8": 0.92}
"""What zstd over byte planes leaves of hidden states of a trained model, before it was measured."""
_OTHER_SHARE: Final = 0.86
_QUANTIZING_S: Final = 3e-9
"""Seconds per byte to quantize and back."""
_QUANTIZING_CALL_S: Final = 1e-4
"""Seconds for both however few bytes there are."""


@dataclass(slots=True)
class _Kind:
    """Payloads that are alike."""

    share: float
    num_since_sample: int = 0


@dataclass(slots=True)
class Compression:
    """What is done to the payloads of one connection in one direction, and what came of it so far."""

    mode: Mode
    price_s: float = _PRICE_S
    """Seconds per byte to compress."""
    _kinds: dict[tuple[str, str], _Kind] = field(default_factory=dict)

    def wants(self, message: str, encoding: str, num_bytes: int, bytes_per_s: float | None) -> bool:
        """Whether to compress a tensor: ``message`` and ``encoding`` say of which kind it is."""
        if self.mode == "none" or num_bytes < MIN_BYTES:
            return False
        if self.mode == "zstd":
            return True
        if bytes_per_s is None:
            return False
        packed_s = num_bytes * self.price_s * (1 + _UNPACK_SHARE)
        return packed_s + self._of(message, encoding).share * num_bytes / bytes_per_s < num_bytes / bytes_per_s

    def wants_sample(self, message: str, encoding: str, num_bytes: int, bytes_per_s: float | None) -> bool:
        """Whether to try a small part of a tensor that is not compressed, because that may have become worth it."""
        if self.mode != "auto" or num_bytes < MIN_BYTES or bytes_per_s is None:
            return False
        if self.price_s * (1 + _UNPACK_SHARE) * bytes_per_s > 0.5:
            return False  # nothing that may become of hidden states would be worth it
        kind = self._of(message, encoding)
        kind.num_since_sample += 1
        if kind.num_since_sample < _SAMPLE_EVERY:
            return False
        kind.num_since_sample = 0
        return True

    def note(self, message: str, encoding: str, num_bytes: int, packed_bytes: int, duration_s: float) -> None:
        """Take into account what compression made of some bytes."""
        if num_bytes:
            kind = self._of(message, encoding)
            kind.share += _WEIGHT * (packed_bytes / num_bytes - kind.share)
            self.price_s += _WEIGHT * (duration_s / num_bytes - self.price_s)

    def _of(self, message: str, encoding: str) -> _Kind:
        key = (message, encoding)
        if key not in self._kinds:
            self._kinds[key] = _Kind(_SHARES.get(encoding, _OTHER_SHARE))
        return self._kinds[key]


def quantized_arrives_first(num_elements: int, item_bytes: int, bytes_per_s: float | None) -> bool:
    """Whether elements arrive earlier as ``int8``, for who allows that; where the rate is not known, they do."""
    if bytes_per_s is None:
        return True
    saved_s = num_elements * (item_bytes - 1) / bytes_per_s
    return saved_s > num_elements * item_bytes * _QUANTIZING_S + _QUANTIZING_CALL_S
