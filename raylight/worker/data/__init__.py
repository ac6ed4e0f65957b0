"""A user's loader as the batches of one rank."""
