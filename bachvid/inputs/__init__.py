"""What a person writes: stories and configs. No torch."""
