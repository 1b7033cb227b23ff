"""What the methods do to attention at run time, with torch: controls."""
