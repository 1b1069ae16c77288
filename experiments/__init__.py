"""The paper's comparisons, the offline study and the benchmarks, on the public API of `cola`."""
