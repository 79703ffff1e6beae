"""The wire protocol without input or output: bytes in, events out, bytes to send (``docs/protocol.md``)."""
