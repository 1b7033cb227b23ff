"""What models are: their sizes, layouts and defaults, by family, read without any weight."""
