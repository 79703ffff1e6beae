"""The benchmark suite: ``python3 tools/bench --help``."""
