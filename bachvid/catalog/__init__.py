"""What models are: sizes, layers, files, published ones. No torch."""
