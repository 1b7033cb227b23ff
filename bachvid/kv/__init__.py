"""What frame videos reuse of an identity video, and how it is stored, packed and pulled."""
