"""Stored tokens read back for training: the order of an epoch, its split over processes, and batches."""
