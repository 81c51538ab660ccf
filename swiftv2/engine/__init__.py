"""The engine wing: ranks, steps, checkpoints and what watches over them."""
