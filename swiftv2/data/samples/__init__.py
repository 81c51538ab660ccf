"""From a store to batches: which clips, in which order, scaled how."""
