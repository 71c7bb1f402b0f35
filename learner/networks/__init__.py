"""Networks: backbones (transformers, convolutional networks), heads, attribution, initial weights."""
