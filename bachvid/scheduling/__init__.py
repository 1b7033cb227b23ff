"""Decides which worker renders what next. Pure: no torch, no Ray."""
