"""What keeps the house in order: the map of CONTRIBUTING.md, the documentation site. No package needs it."""
