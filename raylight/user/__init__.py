"""What a person subclasses or meets in a hook."""
