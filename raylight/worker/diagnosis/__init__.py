"""What a person is shown of a failure, and where time and memory go."""
