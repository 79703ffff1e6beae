"""The attention cache: pages that sessions take and give back, and the tensors that the pages are of."""
