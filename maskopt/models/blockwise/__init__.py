"""One walk through the decoder blocks: hidden states, Gram matrices, gradients, devices and processes."""
