"""The microbenchmark suite and the scripts behind every recorded number; installed as ``reflective.benchmarks``."""
