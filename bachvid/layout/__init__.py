"""Where tokens, heads and branches lie, and what is recorded of them. No torch."""
