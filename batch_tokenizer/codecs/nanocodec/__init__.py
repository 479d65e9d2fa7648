"""NanoCodec (NeMo): HiFi-GAN layers down to frames, groups of finite scalar quantizers, and a causal way back up."""
