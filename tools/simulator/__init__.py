"""Swarms of thousands of servers in simulated time, by the product's own rules of placement and routing."""
