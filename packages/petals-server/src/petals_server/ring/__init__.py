"""A server's part in a chain: sessions that take steps from the client or the server before and pass outputs on."""
