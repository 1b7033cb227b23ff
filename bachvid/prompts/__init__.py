"""The text that a model reads, and which tokens are whose. No torch."""
