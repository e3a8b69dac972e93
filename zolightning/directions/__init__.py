"""Directions: what is added to a weight, as a function of integers."""
