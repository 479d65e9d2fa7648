"""A finished run read back: its source, its shards, its stored and scored rows."""
