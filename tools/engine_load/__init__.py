"""What ``tools/bench_engine.py`` puts on one server: clients of the wire protocol, and the engine without a network."""
