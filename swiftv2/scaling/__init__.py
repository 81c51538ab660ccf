"""Scaling laws: tables of runs, the law fitted to them with intervals, and what it predicts; numpy and scipy alone."""
