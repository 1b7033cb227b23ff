"""The seam between methods and models: attention that a control may watch and change."""
