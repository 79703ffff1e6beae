"""asyncio around the wire protocol: TLS bound to identities, listener, dialer, streams, calls."""
