"""What will run, where, with how many bytes. No torch, no Ray."""
