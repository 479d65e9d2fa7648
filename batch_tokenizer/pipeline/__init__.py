"""A run: rows from the manifest through loader, packer, codec and writers to the ledger."""
