"""Does an attack find what is there? (Zimmermann et al. 2022, arXiv:2211.?????)

For each image a new question of two answers is put on the model's own features: is this the image, or the point
that was planted at its ball's edge? The readout answers it rightly, so an adversarial is there by construction.
"""
