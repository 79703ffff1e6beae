"""Which servers compute which blocks, for clients and for whoever shows what they would do: values and rules only."""
