"""Networks: the V-Net encoder, the two decoders, the heads, and the module that joins them."""
