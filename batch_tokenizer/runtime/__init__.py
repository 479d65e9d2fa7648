"""Processes, devices, work queue, ledger, signals. Knows nothing of audio or models."""
