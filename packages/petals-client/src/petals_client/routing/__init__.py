"""Which servers compute which blocks: values and decisions only, no sockets and no clock."""
