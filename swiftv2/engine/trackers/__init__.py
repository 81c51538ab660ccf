"""Trackers: each in a process of its own, so that none can stop, slow or fail a run."""
