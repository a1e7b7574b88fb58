"""Learned group convolution: layers, training schedule, condensing, and converting other networks to it."""
