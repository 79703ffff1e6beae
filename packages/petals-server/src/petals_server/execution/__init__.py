"""What the device computes: batches of sessions' tokens, and requests that it computes alone."""
