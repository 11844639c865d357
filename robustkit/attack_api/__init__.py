"""What attacks are written against: iterative attacks row by row, compositions, surrogates."""
