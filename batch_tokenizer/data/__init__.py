"""From manifest rows to batches in memory: loader processes and packing by budget."""
