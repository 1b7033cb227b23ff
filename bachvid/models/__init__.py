"""How each family is run: an adapter on the diffusers classes, which stay as they are."""
