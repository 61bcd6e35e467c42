"""Building blocks of networks: tensors in, tensors out, nothing known of codes, images or training."""
