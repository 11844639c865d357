"""The common corruptions of ImageNet-C and CIFAR-10-C, computed from clean images or read from files."""
