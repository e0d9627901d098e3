"""Decoder architectures as data: `spec.DecoderSpec`, one small file per architecture, and the way from a
checkpoint's tensors to the decoder's slots (`loader.iter_tensors`)."""
