"""Images in and out of the VAE: conditioning, keyframes, decoding."""
