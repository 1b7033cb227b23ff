"""What is written: the run directory, its journal, and the files of each video. No torch."""
