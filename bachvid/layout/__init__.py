"""Where tokens, heads and branches lie. No torch."""
