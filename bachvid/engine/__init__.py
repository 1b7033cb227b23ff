"""What one process does to render: the loop over steps, the runs of a video, their results."""
