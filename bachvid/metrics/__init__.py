"""What the videos of a run are measured by: one file per metric, arrays in, numbers out."""
