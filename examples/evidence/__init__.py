"""Evidence: where recursion pays, and where not. `make evidence`; docs/evidence.md says what came of it."""
