"""Searching for the best settings of fine-tuning with Optuna: one keeper of a study, any number of workers."""
