"""What is written into a run directory."""
