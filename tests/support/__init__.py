"""What several tests share: small random checkpoints, audio, and the command line as a process."""
