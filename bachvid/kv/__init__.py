"""What identity videos leave, and how it travels."""
