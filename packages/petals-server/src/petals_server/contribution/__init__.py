"""Who has computed for others, from receipts that both sides signed, and what share of this server that gives."""
