"""The Python API, and the render that it drives."""
