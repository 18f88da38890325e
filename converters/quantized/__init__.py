"""Quantized tensors: the settings, the packed layouts and their decoding."""
