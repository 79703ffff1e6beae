"""An emulated network on one machine: hosts with delay, rate, loss and outages. See docs/network-lab.md."""
