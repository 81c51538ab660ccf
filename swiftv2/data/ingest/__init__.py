"""One run, from its files to the numbers, masks and statistics of its row in a store."""
