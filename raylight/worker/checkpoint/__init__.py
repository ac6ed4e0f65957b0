"""What a checkpoint holds, how it is taken and how it is read back."""
