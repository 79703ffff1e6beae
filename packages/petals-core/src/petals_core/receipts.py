"""Receipts: what a server computed for a client, signed by both. They are records, not money: nobody can spend one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from petals_core import schema
from petals_core.errors import InvalidRequestError
from petals_core.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, PeerId, verify
from petals_core.limits import MAX_CLOCK_SKEW_S, MAX_RECEIPT_BYTES
from petals_core.schema import ruled

MAX_AGE_S = 30 * 86_400.0
"""Older receipts count for nothing, so that they need not be kept for ever."""
MAX_RECEIPTS = 4096
"""The latest ones that a server keeps."""
_LENGTH_BYTES = 2
MAX_FILE_BYTES = 2 * MAX_RECEIPTS * (MAX_RECEIPT_BYTES + _LENGTH_BYTES)
"""Of a file of receipts; what comes behind is not read."""
_RECEIPT_CONTEXT = b"petals receipt 1\0"
_ENDORSEMENT_CONTEXT = b"petals endorsement 1\0"
_NONCE_BYTES = 16
_key = schema.binary(PUBLIC_KEY_BYTES, PUBLIC_KEY_BYTES)
_signature = schema.binary(SIGNATURE_BYTES, SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What both sides sign."""

    server_key: bytes = ruled(_key)
    client_key: bytes = ruled(_key)
    nonce: bytes = ruled(schema.binary(_NONCE_BYTES, _NONCE_BYTES))
    """Chosen by the client, so that no receipt counts twice."""
    block_tokens: int = ruled(schema.integer(1, 1 << 48))
    """Tokens times blocks that the server computed for the client, beyond what earlier receipts say."""
    signed_at_s: float = ruled(schema.number(0, 1e11))
    """Unix time."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """A statement with the client's signature, and with the server's once it has agreed. Always authentic."""

    statement: Statement
    content: bytes
    client_signature: bytes
    server_signature: bytes | None

    @classmethod
    def sign(cls, statement: Statement, client: Identity) -> Self:
        """The client's half."""
        content = schema.pack(schema.to_map(statement))
        return cls(statement, content, client.sign(_RECEIPT_CONTEXT + content), None)

    def countersign(self, server: Identity) -> Self:
        """The whole.

        Raises:
            InvalidRequestError: it is about another server.
        """
        if self.statement.server_key != server.public_key:
            raise InvalidRequestError("the receipt names another server")
        return type(self)(
            self.statement, self.content, self.client_signature, server.sign(_RECEIPT_CONTEXT + self.content)
        )

    @property
    def encoded(self) -> bytes:
        """The wire form, and that of files."""
        signatures = [self.client_signature]
        if self.server_signature is not None:
            signatures.append(self.server_signature)
        return schema.pack([self.content, *signatures])

    @property
    def client_id(self) -> PeerId:
        """Who was served."""
        return PeerId.of_public_key(self.statement.client_key)

    @property
    def server_id(self) -> PeerId:
        """Who served."""
        return PeerId.of_public_key(self.statement.server_key)

    @classmethod
    def decode(cls, encoded: bytes, *, now_s: float) -> Self:
        """Read and verify a receipt from an untrusted peer or a file; one signature is enough.

        Raises:
            InvalidRequestError: it is malformed, forged, too old, from the future, or about a peer serving itself.
        """
        if len(encoded) > MAX_RECEIPT_BYTES:
            raise InvalidRequestError(f"a receipt of {len(encoded)} bytes is over {MAX_RECEIPT_BYTES}")
        try:
            content, *signatures = schema.sequence(schema.binary(1, MAX_RECEIPT_BYTES), 3, 2)(schema.unpack(encoded))
            signatures = [_signature(each) for each in signatures]
            statement = schema.from_map(Statement, schema.unpack(content))
        except schema.SchemaError as error:
            raise InvalidRequestError(f"malformed receipt: {error}") from None
        if not now_s - MAX_AGE_S <= statement.signed_at_s <= now_s + MAX_CLOCK_SKEW_S:
            raise InvalidRequestError("the receipt is too old or from the future")
        if statement.client_key == statement.server_key:
            raise InvalidRequestError("the receipt is of a peer that served itself")
        for key, signature in zip((statement.client_key, statement.server_key), signatures, strict=False):
            if not verify(key, signature, _RECEIPT_CONTEXT + content):
                raise InvalidRequestError("a receipt's signature is not by its key")
        return cls(statement, content, signatures[0], signatures[1] if len(signatures) == 2 else None)


def frame(encoded: bytes) -> bytes:
    """A receipt as files have it: behind its length."""
    return len(encoded).to_bytes(_LENGTH_BYTES, "big") + encoded


def split_file(content: bytes) -> Iterator[bytes]:
    """The receipts of a file, not checked; what is cut off comes out shorter."""
    position = 0
    while position + _LENGTH_BYTES <= len(content):
        end = position + _LENGTH_BYTES + int.from_bytes(content[position : position + _LENGTH_BYTES], "big")
        yield content[position + _LENGTH_BYTES : end]
        position = end


def choose_largest(content: bytes, server: PeerId, *, limit: int, now_s: float) -> list[bytes]:
    """The receipts of a server's file that say most, at most ``limit``; only these are verified, which takes long."""
    claimed: list[tuple[int, bytes]] = []
    for encoded in split_file(content):
        try:
            inner, *_ = schema.sequence(schema.binary(1, MAX_RECEIPT_BYTES), 3, 3)(schema.unpack(encoded))
            claimed.append((schema.from_map(Statement, schema.unpack(inner)).block_tokens, encoded))
        except schema.SchemaError:
            continue
    chosen: list[bytes] = []
    for _, encoded in sorted(claimed, reverse=True):
        if len(chosen) == limit:
            break
        try:
            receipt = Receipt.decode(encoded, now_s=now_s)
        except InvalidRequestError:
            continue
        if receipt.server_id == server:
            chosen.append(encoded)
    return chosen


def endorse(server: Identity, client_id: PeerId) -> bytes:
    """A server's word that a client is of the same owner: public key and signature."""
    return server.public_key + server.sign(_ENDORSEMENT_CONTEXT + client_id.digest)


def read_endorsement(encoded: bytes, client_id: PeerId) -> PeerId:
    """The server that endorses ``client_id``.

    Raises:
        InvalidRequestError: it does not.
    """
    key, signature = encoded[:PUBLIC_KEY_BYTES], encoded[PUBLIC_KEY_BYTES:]
    if not verify(key, signature, _ENDORSEMENT_CONTEXT + client_id.digest):
        raise InvalidRequestError("the endorsement is not of this client by that server")
    return PeerId.of_public_key(key)
