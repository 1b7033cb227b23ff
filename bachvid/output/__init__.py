"""Writes and reads the run directory, its journal, and the files of each video. No torch."""
