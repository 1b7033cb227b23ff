"""What an identity video leaves to its frame videos, and how that is stored, packed and pulled."""
