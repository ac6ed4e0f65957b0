"""What driver and workers say to each other."""
