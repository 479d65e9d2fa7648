"""One file for each subcommand, named as it is typed."""
