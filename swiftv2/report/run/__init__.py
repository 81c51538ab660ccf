"""The page of a run, read top down: a verdict first, what it rests on below."""
