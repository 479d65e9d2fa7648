"""Device kernels with one seam per backend: packed attention, packing, segment norms. Imports torch only."""
