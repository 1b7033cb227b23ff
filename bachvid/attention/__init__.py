"""The seam between methods and models: controls, and the attention that they change."""
