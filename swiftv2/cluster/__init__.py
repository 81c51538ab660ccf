"""Slurm from outside: what is queued, what is started again, how runs stand, arrays of runs."""
