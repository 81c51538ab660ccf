"""Runs into a store and out of it: each change makes one more version."""
