"""Metrics of the videos of a run. One file for each metric: arrays in, numbers out."""
