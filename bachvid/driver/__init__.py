"""The Python API: a story is planned, rendered by a pool of workers, and kept. No torch."""
