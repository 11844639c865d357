"""Training on adversarial images, and other training of one robust net."""
