"""What a module logs, from its rank to the driver."""
