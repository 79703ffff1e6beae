"""The receipts of a server on disk."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from petals_core.errors import InvalidRequestError
from petals_core.receipts import MAX_FILE_BYTES, MAX_RECEIPTS, Receipt, frame, split_file

log = logging.getLogger(__name__)


class ReceiptBook:
    """The latest receipts that a server has for what it computed, bounded, and kept over restarts.

    A file is a sequence of receipts behind their lengths. What is cut off, forged or too old is left out when read.
    """

    def __init__(self, path: Path | None) -> None:
        """``path``: None keeps them in memory alone."""
        self._path = path
        self.receipts: list[Receipt] = []
        self._num_on_disk = 0
        if path is not None:
            self._read(path)

    def add(self, receipt: Receipt) -> None:
        """Keep a receipt with both signatures."""
        self.receipts.append(receipt)
        if len(self.receipts) > MAX_RECEIPTS:
            del self.receipts[0]
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._num_on_disk >= 2 * MAX_RECEIPTS:
                temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
                temporary.write_bytes(b"".join(frame(each.encoded) for each in self.receipts))
                os.replace(temporary, self._path)
                self._num_on_disk = len(self.receipts)
            else:
                with self._path.open("ab") as file:
                    file.write(frame(receipt.encoded))
                self._num_on_disk += 1
        except OSError as error:
            log.warning("a receipt could not be written to %s: %s", self._path, error.strerror or error)
            self._path = None

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("receipts in %s can't be read: %s", path, error.strerror or error)
            return
        now_s = time.time()
        for encoded in split_file(content):
            try:
                receipt = Receipt.decode(encoded, now_s=now_s)
            except InvalidRequestError:
                pass
            else:
                if receipt.server_signature is not None:
                    self.receipts.append(receipt)
            self._num_on_disk += 1
        del self.receipts[:-MAX_RECEIPTS]
