"""One process renders."""
