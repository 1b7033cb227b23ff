"""Methods: what is done to attention. They depend on no model, on no Ray and no diffusers."""
