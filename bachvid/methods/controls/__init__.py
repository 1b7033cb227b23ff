"""The controls of the methods: what they do to attention at run time. Imports torch."""
