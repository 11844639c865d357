"""Sources of images: one file for each kind of data string."""
