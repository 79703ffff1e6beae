"""What makes a server a good guest on its owner's machine: when it serves, how much it sends, what it tells."""
