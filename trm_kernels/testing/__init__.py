"""What tests, benchmarks and the compilation check share: a case for each op."""
