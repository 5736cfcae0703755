"""The benchmarks: see README.md. A package, so that no installed one of the same name comes before it."""
