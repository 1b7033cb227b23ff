"""Methods: what is done to attention. They know no model, no Ray and no diffusers."""
