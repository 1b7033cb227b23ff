"""Which model it is done to: one file per family. No method, no Ray."""
