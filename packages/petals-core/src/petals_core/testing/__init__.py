"""The test kit that the packages share: tiny checkpoints, fault injection, hypothesis strategies."""
