"""How good reconstructions are: metrics of pairs of recordings, use of codebooks, and their aggregates."""
