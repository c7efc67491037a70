"""Sweeps: what is tried, in which order, and what it says."""
