"""Files to samples and back: decoding, resampling, mel front end. The only importer of torchaudio and decoders."""
