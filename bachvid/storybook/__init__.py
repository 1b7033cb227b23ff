"""The embedded model: a procedural world, a small CogVideoX trained on it, and a judge."""
