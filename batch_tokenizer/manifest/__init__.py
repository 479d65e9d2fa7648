"""The manifest: rows of JSON lines, their index by byte offset, and the units of work made of them."""
