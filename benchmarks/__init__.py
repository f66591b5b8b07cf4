"""The benchmark suite: ``python -m benchmarks``. One file per operation family, each with its cases and their
providers."""
