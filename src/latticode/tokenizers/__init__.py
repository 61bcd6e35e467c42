"""Tokenizers: encoder, quantizer and decoder joined, and what is done with whole ones."""
