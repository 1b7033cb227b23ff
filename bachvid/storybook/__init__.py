"""The embedded models: a procedural world, a small model of each family, and a judge."""
