"""Recipes join the three wings: each puts the parts together in a page."""
